"""Folding against the unfolded model in float64, and every reason to leave a BatchNorm alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import octavo as ov
from octavo import OctavoError
from octavo.nn.linear import QuantizedLinear
from octavo.ptq.fold import clamp_of, fold_batch_norms_, fuse_relu_
from tests.ptq.convolutional import NETWORKS, images, output, trained


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def check(model, x, example=True):
    """Fold a model; its function in float64 stays."""
    model = model.double().eval()
    x = x.double()
    expected = output(model, x)
    fused = fold_batch_norms_(model, x if example else None)
    y = output(model, x)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    return fused


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = NETWORKS[name]()
    before = norms(model)
    fused = check(model, images() if name != "hf_mobilenet" else torch.randn(2, 3, 32, 32))
    assert fused.left == {} and [norm for _, norm in fused.pairs] == before and not norms(model)
    assert all(isinstance(model.get_submodule(norm), nn.Identity) for _, norm in fused.pairs)
    assert fold_batch_norms_(model).pairs == []  # and nothing is left to do, nor to trace


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "decoder"])
def test_symbolically(name):
    model = NETWORKS[name]()
    before = norms(model)
    assert [norm for _, norm in check(model, images(), example=False).pairs] == before


def test_in_the_dtype_of_the_model():
    model = NETWORKS["resnet"]().bfloat16()
    expected = copy.deepcopy(model).double()(images().double())
    fold_batch_norms_(model, images().bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert ov.sqnr(expected, model(images().bfloat16()).double()) > 30


LAYERS = {
    "conv1d": (nn.Conv1d(6, 8, 3, groups=2, dilation=2), nn.BatchNorm1d(8), (2, 6, 11)),
    "conv3d": (nn.Conv3d(4, 8, 2, bias=False), nn.BatchNorm3d(8), (2, 4, 3, 4, 5)),
    "reflecting": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), nn.BatchNorm2d(6, eps=0.1), (2, 4, 5, 6)),
    "depthwise": (nn.Conv2d(5, 15, 3, padding="same", groups=5), nn.BatchNorm2d(15), (2, 5, 7, 7)),
    "transposed1d": (nn.ConvTranspose1d(6, 9, 4, 2, groups=3), nn.BatchNorm1d(9), (2, 6, 7)),
    "transposed2d": (nn.ConvTranspose2d(6, 6, 3, 2, 1, 1, groups=6), nn.BatchNorm2d(6), (2, 6, 4, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 2, 2, bias=False), nn.BatchNorm3d(2, affine=False), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(6, 4), nn.BatchNorm1d(4), (3, 6)),
    "synchronized": (nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), (2, 3, 2, 2)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    layer, norm, shape = LAYERS[case]
    model = trained(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm)))
    assert check(model, torch.randn(shape)).pairs == [("0", "1")]


class Frozen(nn.Module):
    """What detection models have in the place of BatchNorm; ``power`` makes it something else."""

    def __init__(self, width, power=1):
        super().__init__()
        self.register_buffer("weight", torch.rand(width) + 0.5)
        self.register_buffer("bias", torch.randn(width))
        self.register_buffer("running_mean", torch.randn(width))
        self.register_buffer("running_var", torch.rand(width) + 0.5)
        self.power = power

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)) ** self.power


class Activated(nn.BatchNorm2d):
    """timm's: a BatchNorm with the activation inside."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Composed(nn.BatchNorm2d):
    """The same with the activation as a module."""

    def __init__(self, width):
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def test_classes_of_somebodys_own():
    x = torch.randn(2, 3, 5, 5)
    assert check(nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4)), x).pairs == [("0", "1")]
    left = check(nn.Sequential(nn.Conv2d(3, 4, 3), Frozen(4, 2)), x).left
    assert "something else" in left["1"]
    left = check(trained(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4))), x).left
    assert "an Activated computes something else" in left["1"]
    left = check(trained(nn.Sequential(nn.Conv2d(3, 4, 3), Composed(4))), x).left
    assert left["1"] == "a Composed holds other modules (act) and does more than one thing"


class Net(nn.Module):
    def __init__(self, forward, **parts):
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def plain(net, x):
    return net.norm(net.conv(x))


def unreached(net, x):
    return net.norm(net.conv(x)) if len(x) == 99 else net.conv(x)


LEFT = {
    (lambda net, x: net.norm(y := net.conv(x)) + y): "the result of conv also goes to the function 'add'",
    (lambda net, x: (net.norm(y := net.conv(x)), y)[0] + 0 * y.sum()): "also goes to the function 'sum'",
    (lambda net, x: net.norm(net.conv(x)) + net.norm(net.conv(x))): "it runs 2 times",
    (lambda net, x: net.norm(net.conv(x)) + net.conv(x)): "conv, before it, runs 2 times",
    (lambda net, x: net.norm(F.relu(net.conv(x)))): "comes from the function 'relu'",
    (lambda net, x: net.conv(net.norm(x))): "an input of the model",
    (lambda net, x: net.norm(net.conv(x)) + net.conv.weight.sum()): "the weight of conv is also read by",
    (lambda net, x: net.norm(net.conv(x)) + net.conv.bias.view(1, -1, 1, 1)): "the bias of conv is also read by",
    (lambda net, x: net.norm(net.conv(x).transpose(2, 3))): "function 'transpose'",
    unreached: "does not reach it",
}


@pytest.mark.parametrize("forward", LEFT, ids=range(len(LEFT)))
def test_who_stays_and_why(forward):
    model = trained(Net(forward))
    before = copy.deepcopy(model.state_dict())
    fused = fold_batch_norms_(model, torch.randn(2, 4, 3, 3))
    assert fused.pairs == [] and LEFT[forward] in fused.left["norm"]
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "norm stays: " in str(fused)


def test_returned_results_stay():
    fused = fold_batch_norms_(trained(Net(lambda net, x: (net.norm(y := net.conv(x)), y))), torch.randn(2, 4, 3, 3))
    assert "also goes to the output" in fused.left["norm"]


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def broken(norm, **values):
    for name, value in values.items():
        with torch.no_grad():
            getattr(norm, name)[1] = value
    return norm


PARTS = {
    "train mode": {"norm": nn.BatchNorm2d(4)},
    "track_running_stats": {"norm": nn.BatchNorm2d(4, track_running_stats=False)},
    "forward of its own": {"conv": Doubling(4, 4, 1)},
    "parametrization": {"conv": parametrizations.weight_norm(nn.Conv2d(4, 4, 1))},
    "another axis": {"conv": nn.Linear(3, 3)},
    "a GroupNorm": {"conv": nn.GroupNorm(2, 4)},
    "not be finite": {"norm": broken(nn.BatchNorm2d(4), running_mean=float("nan"))},
    "be finite": {"norm": broken(nn.BatchNorm2d(4), running_var=-1.0)},
}


@pytest.mark.parametrize("why", PARTS)
def test_parts_that_cannot_be_folded(why):
    model = Net(plain, **PARTS[why]).train(why == "train mode")
    fused = fold_batch_norms_(model, torch.randn(2, 4, 3, 3))
    assert fused.pairs == [] and why in fused.left["norm"]
    assert model.training == (why == "train mode")


def test_weights_that_others_share():
    model = trained(Net(plain))
    model.other.weight = model.conv.weight
    assert "shares its weights with other" in fold_batch_norms_(model, torch.randn(1, 4, 2, 2)).left["norm"]
    with pytest.warns(FutureWarning):
        model = trained(Net(plain, conv=weight_norm(nn.Conv2d(4, 4, 1))))
    assert "computed" in fold_batch_norms_(model, torch.randn(1, 4, 2, 2)).left["norm"]


def test_too_large_for_half():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), broken(nn.BatchNorm2d(4, eps=0), running_var=1e-12)).half().eval()
    model[1].float()
    left = fold_batch_norms_(model, torch.randn(1, 4, 2, 2), call=lambda model, x: model[1](model[0].half()(x.half())))
    assert "float16" in left.left["1"]


def test_hooks_that_watch():
    model = trained(Net(plain))
    model.conv.register_forward_hook(lambda *_: None)
    assert "a hook stands between" in fold_batch_norms_(model, torch.randn(1, 4, 2, 2)).left["norm"]


def test_linear_without_an_example():
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert "give an example batch" in fold_batch_norms_(model).left["1"]
    time_axis = torch.randn(2, 4, 4)  # BatchNorm1d normalizes axis 1, the layer's channels are axis 2
    assert "another axis" in check(model, time_axis).left["1"]


def test_models_that_fx_cannot_follow_ask_for_an_example():
    model = trained(Net(lambda net, x: net.norm(net.conv(x)) if x.sum() else x))
    with pytest.raises(OctavoError, match="give an example"):
        fold_batch_norms_(model)
    assert fold_batch_norms_(model, torch.randn(1, 4, 2, 2)).pairs == [("conv", "norm")]


def test_meta_models_hold_no_numbers():
    model = trained(Net(plain)).to("meta")
    assert "meta device" in fold_batch_norms_(model).left["norm"]


def test_several_names_and_a_frozen_layer():
    model = trained(Net(plain))
    model.alias = model.norm
    model.conv.weight.requires_grad_(False)
    model.conv.bias = None
    check(model, torch.randn(2, 4, 3, 3))
    assert isinstance(model.alias, nn.Identity) and model.alias is model.norm
    assert not model.conv.bias.requires_grad


def test_the_function_survives_training_mode_of_other_modules():
    model = NETWORKS["mobilenet"]().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not fold_batch_norms_(model, images()).left
    assert model.training and model[-2].training


def multilayer(*activations):
    layers = [part for activation in activations for part in (nn.Linear(6, 6), activation)]
    return nn.Sequential(*layers, nn.Linear(6, 2)).eval()


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-weight-only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("example", [True, False])
def test_fused_activations_give_the_same_numbers(scheme, dtype, example):
    model = multilayer(nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.1, 0.3)).to(dtype)
    ov.quantize_(model, scheme)
    x = 3 * torch.randn(9, 6, dtype=dtype)
    expected = model(x)
    fused = fuse_relu_(model, x if example else None)
    assert fused.pairs == [("0", "1"), ("2", "3"), ("4", "5")] and not fused.left
    assert torch.equal(model(x), expected)
    assert [model[i].clamp for i in (0, 2, 4, 6)] == [(0, float("inf")), (0, 6), (-0.1, 0.3), None]
    assert "clamp=(0.0, 6.0)" in repr(model)
    assert copy.deepcopy(model)[2].clamp == (0, 6)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight-only"])
@pytest.mark.parametrize("name", ["mobilenet", "decoder"])
def test_convolutions_take_activations_over(name, scheme):
    model = NETWORKS[name]()
    fold_batch_norms_(model, images())
    ov.quantize_(model, scheme)
    expected = model(images())
    fused = fuse_relu_(model, images())
    assert len(fused.pairs) == {"mobilenet": 5, "decoder": 2}[name] and not fused.left
    assert torch.equal(model(images()), expected)


def test_activations_that_stay():
    shared = nn.ReLU()
    model = multilayer(shared, shared, nn.ReLU(), nn.GELU())
    left = fuse_relu_(model, torch.randn(2, 6)).left
    assert "runs 2 times" in left["1"] and "a Linear, not from an 8-bit layer" in left["5"] and "7" not in left
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.ReLU6())
    ov.quantize_(model, "int8-dynamic")
    assert fuse_relu_(model, torch.randn(2, 6)).pairs == [("0", "1")]
    assert "has taken over another" in fuse_relu_(model, torch.randn(2, 6)).left["2"]
    residual = Net(lambda net, x: net.norm(y := net.conv(x)) + y, conv=nn.Linear(4, 4), norm=nn.ReLU())
    ov.quantize_(residual, "int8-dynamic")
    assert "also goes to the function 'add'" in fuse_relu_(residual, torch.randn(2, 4)).left["norm"]


def test_what_is_a_clamp():
    assert clamp_of(nn.ReLU()) == (0, float("inf")) and clamp_of(nn.ReLU6()) == (0, 6)
    assert clamp_of(nn.LeakyReLU()) is clamp_of(nn.SiLU()) is clamp_of(nn.Hardsigmoid()) is None

    class Leaking(nn.ReLU):
        def forward(self, x):
            return F.leaky_relu(x)

    assert clamp_of(Leaking()) is None


def test_batch_norms_behind_8_bit_layers_stay():
    model = NETWORKS["perceptron"]()
    ov.quantize_(model, {"1": "int8-dynamic"})
    assert isinstance(model[1], QuantizedLinear)
    fused = fold_batch_norms_(model, images())
    assert "fold first, then quantize" in fused.left["2"] and fused.pairs == [("4", "5")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_parts_stay():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    model = nn.Sequential(scripted, nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    assert "it is scripted" in fold_batch_norms_(model, x).left["0.1"]
    summary = ov.quantize_(model, "int8-static", [x])
    assert [layer.name for layer in summary.quantized] == ["1"]
    assert model(x).shape == (2, 4, 6, 6)
