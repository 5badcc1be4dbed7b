"""Corrected biases: means that agree with the float model, less error on new data, and nothing done on bad input."""

import copy

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

import octavo as ov
from octavo import Cast, OctavoError, OctavoWarning, PerTensor, Scheme
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.bias_correction import correct_biases_, correct_biases_without_data_, expected_inputs
from octavo.ptq.fold import fold_batch_norms_, fuse_relu_
from tests.nn import models
from tests.ptq.convolutional import NETWORKS, images, output, trained

COARSE = ov.schemes.weight_only(ov.formats.E5M2)


def quantized(model, scheme=COARSE, data=None):
    twin = copy.deepcopy(model)
    ov.quantize_(twin, [ov.Rule(scheme)], data)
    return twin


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def biases(model):
    return {name: None if m.bias is None else m.bias.clone() for name, m in layers(model).items()}


@torch.no_grad()
def sample_means(model, names, batches):
    """Mean results over all positions of each sample, [samples, out] a layer, in numpy and float64."""
    seen = {name: [] for name in names}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        channels = 1 if hasattr(module, "kernel_size") else -1

        def hook(module, args, y, name=name, channels=channels):
            y = np.moveaxis(y.double().numpy(), channels, -1)
            seen[name].append(y.reshape(len(y), -1, y.shape[-1]).mean(1))

        handles.append(module.register_forward_hook(hook))
    for batch in batches:
        output(model, batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def a_pass_a_layer(model, exact, batches):
    """The paper's procedure (appendix D): measure one layer over all data, correct it, go on to the next."""
    wanted = sample_means(exact, layers(model), batches)
    for name, layer in layers(model).items():
        errors = wanted[name] - sample_means(model, [name], batches)[name]
        mean, chance = errors.mean(0), errors.var(0, ddof=1).sum() / len(errors)
        mean = mean * max(0, 1 - chance / (mean**2).sum())
        old = 0 if layer.bias is None else layer.bias.double()
        layer.bias = (old + torch.from_numpy(mean)).float()


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "decoder", "perceptron", "hf_resnet"])
def test_one_batch_equals_a_pass_a_layer(name, folded):
    exact = NETWORKS[name]()
    if folded:
        fold_batch_norms_(exact, images())
    model = quantized(exact)
    oracle = copy.deepcopy(model)
    data = [images(8)]
    a_pass_a_layer(oracle, exact, data)
    shifts = correct_biases_(model, exact, data)
    assert list(shifts) == list(layers(model)) and all(x.ndim == 1 for x in shifts.values())
    assert max(shift.abs().max() for shift in shifts.values()) > 1e-2
    for layer in shifts:
        expected = layers(oracle)[layer].bias
        assert torch.allclose(layers(model)[layer].bias, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "scheme", [COARSE, ov.schemes.dynamic(ov.formats.E5M2), Scheme(Cast(ov.formats.INT8, PerTensor()))]
)
@pytest.mark.parametrize("name", ["resnet", "mobilenet", "decoder", "perceptron"])
def test_new_data_comes_out_better(name, scheme):
    exact = NETWORKS[name]()
    fold_batch_norms_(exact, images())
    model = quantized(exact, scheme)
    new = images(64, seed=99)
    with torch.no_grad():
        expected, before = exact(new), model(new)
        correct_biases_(model, exact, [images(16, seed) for seed in range(6)])
        after = model(new)
    assert ov.sqnr(expected, after) > ov.sqnr(expected, before) + 0.3


def test_many_batches_do_as_well_as_a_pass_a_layer():
    exact = NETWORKS["mobilenet"]()
    fold_batch_norms_(exact, images())
    data = [images(16, seed) for seed in range(6)]
    model = quantized(exact)
    oracle = copy.deepcopy(model)
    a_pass_a_layer(oracle, exact, data)
    correct_biases_(model, exact, data)
    new = images(64, seed=99)
    with torch.no_grad():
        quality = [ov.sqnr(exact(new), m(new)) for m in (oracle, model)]
    assert abs(quality[0] - quality[1]) < 0.5


def test_chance_is_no_reason_to_correct():
    """Eight samples of an error whose mean is zero: hardly anything is corrected, of a real one nearly all."""
    exact = nn.Sequential(nn.Linear(64, 64))
    model = quantized(exact, "int8-weight-only")
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 64, generator=generator)]
    errors = (exact(data[0]) - model(data[0])).detach()
    shift = correct_biases_(copy.deepcopy(model), exact, data)["0"]
    assert shift.norm() < 0.6 * errors.mean(0).norm()
    with torch.no_grad():
        exact[0].bias += 0.1
    shift = correct_biases_(model, exact, data)["0"]
    assert torch.allclose(shift.float(), torch.tensor(0.1), atol=0.02)


def test_static_schemes_and_fused_activations():
    exact = NETWORKS["mobilenet"]()
    fold_batch_norms_(exact, images())
    data = [images(16, seed) for seed in range(4)]
    model = quantized(exact, "int8-static", data)
    apart = copy.deepcopy(model)
    assert fuse_relu_(model, images()).pairs
    clamps = {name: layer.clamp for name, layer in layers(model).items()}
    correct_biases_(apart, exact, data)
    correct_biases_(model, exact, data)
    assert {name: layer.clamp for name, layer in layers(model).items()} == clamps
    for name, bias in biases(apart).items():  # before the clamp, as if it were a module of its own
        assert torch.equal(layers(model)[name].bias, bias)


def test_layers_without_a_bias():
    exact = models.llama()
    data = [{"input_ids": torch.randint(3, models.VOCABULARY, (4, 12))} for _ in range(3)]
    model = quantized(exact, ov.schemes.weight_only(ov.formats.E5M2))
    with pytest.raises(OctavoError, match="no 8-bit layer whose bias"):
        correct_biases_(model, exact, data, new_biases=False)
    before = ov.sqnr(models.logits(exact), models.logits(model))
    shifts = correct_biases_(model, exact, data)
    assert all(torch.allclose(layers(model)[name].bias.double(), shift) for name, shift in shifts.items())
    assert ov.sqnr(models.logits(exact), models.logits(model)) > before - 0.5
    model = quantized(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)))
    exact = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    exact.load_state_dict({"0.weight": model[0].weight, "1.weight": model[1].weight, "1.bias": model[1].bias + 1})
    shifts = correct_biases_(model, exact, [torch.randn(50, 4)], new_biases=False)
    assert list(shifts) == ["1"] and torch.allclose(shifts["1"], torch.ones(4, dtype=torch.float64))
    assert model[0].bias is None


def test_bfloat16_and_single_rows():
    exact = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).bfloat16()
    model = quantized(exact)
    correct_biases_(model, exact, [torch.randn(6).bfloat16() for _ in range(20)])
    assert {layer.bias.dtype for layer in layers(model).values()} == {torch.bfloat16}


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def test_a_layer_that_runs_twice():
    exact = Net(lambda net, x: net.second(net.first(x)) + net.second(x[:3]).sum())
    model = quantized(exact)
    data = [torch.randn(8, 6)]
    correct_biases_(model, exact, data)
    expected, found = (sample_means(m, ["second"], data)["second"].mean(0) for m in (exact, model))
    assert np.abs(expected - found).max() < 1e-2


def test_rows_that_go_elsewhere_in_8_bits():
    """A router may send other rows to a layer than in float; their means say nothing about rounding."""

    def routed(net, x):
        return net.first(x[: 4 + isinstance(net.first, QuantizedLayer)]), net.second(x)

    exact = Net(routed)
    model = quantized(exact)
    before = biases(model)
    with pytest.warns(OctavoWarning, match="no two samples ran first on as many rows"):
        assert list(correct_biases_(model, exact, [torch.randn(8, 6)])) == ["second"]
    assert torch.equal(model.first.bias, before["first"])


def test_models_that_are_not_the_same():
    exact = NETWORKS["resnet"]()
    folded = copy.deepcopy(exact)
    fold_batch_norms_(folded, images())
    model = quantized(folded)
    before = biases(model)
    for other, message in [
        (model, "no float layer 0"),
        (nn.Sequential(nn.Conv2d(3, 8, 5)), "weight of 0 .* is not what was quantized"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "weight of 0 .* is not what was quantized"),
        (nn.Sequential(nn.ReLU()), "no float layer 0"),
        (NETWORKS["resnet"](), "1 is a BatchNorm in one model only"),
    ]:
        with pytest.raises(OctavoError, match=message):
            correct_biases_(model, other, [images()])
    with pytest.raises(OctavoError, match="no 8-bit layer"):
        correct_biases_(exact, exact, [images()])
    assert all(torch.equal(before[name], bias) for name, bias in biases(model).items())


def test_data_that_fails():
    exact = NETWORKS["perceptron"]()
    model = quantized(exact).train()
    fuse_relu_(model)
    before = biases(model)

    def stream():
        yield images()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        correct_biases_(model, exact, stream())
    with pytest.raises(OctavoError, match="put it into a list"):
        correct_biases_(model, exact, images())
    with pytest.raises(OctavoError, match="held no batch"):
        correct_biases_(model, exact, iter([]))
    with pytest.raises(OctavoError, match="results of 1 hold NaN"):
        correct_biases_(model, exact, [images() * float("nan")])
    after = biases(model)
    assert all(after[name] is bias or torch.equal(after[name], bias) for name, bias in before.items())
    assert model.training and not exact.training
    assert not any(m._forward_hooks for m in (*model.modules(), *exact.modules()))


CLAMPS = {nn.Identity(): (-np.inf, np.inf), nn.ReLU(): (0, np.inf), nn.ReLU6(): (0, 6), nn.Hardtanh(-1, 0.5): (-1, 0.5)}


@pytest.mark.parametrize("activation", CLAMPS, ids=str)
def test_the_mean_of_a_clamped_normal(activation):
    """Against numerical integration."""
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2, 0.1, 4, 0]))
        norm.bias.copy_(torch.tensor([0.5, -1, 3, 5, -0.25]))
    model = nn.Sequential(norm, activation, nn.Conv2d(5, 2, 1)).eval()
    found = expected_inputs(model, torch.randn(2, 5, 3, 4))["2"]
    assert found.shape == (1, 5, 3, 4)
    low, high = CLAMPS[activation]
    for channel, (mean, std) in enumerate(zip(norm.bias.tolist(), norm.weight.abs().tolist(), strict=True)):
        expected = np.clip(mean, low, high)
        if std > 0:
            points = np.clip([low, high], mean - 12 * std, mean + 12 * std)
            expected = integrate.quad(
                lambda x: np.clip(x, low, high) * stats.norm.pdf(x, mean, std),  # noqa: B023
                *(mean - 12 * std, mean + 12 * std),
                points=points,
            )[0]
        assert torch.allclose(found[0, channel].float(), torch.tensor(expected).float(), atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False),
        lambda: nn.Conv2d(6, 12, 3, stride=2, groups=6),
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2),
    ],
    ids=["conv", "depthwise", "transposed"],
)
def test_without_data_where_results_are_normal(layer):
    """The norm's input is drawn so that its result is normal: then the correction equals the mean error measured."""
    model = trained(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), layer()))
    norm = model[0]
    noise = torch.randn(4000, 6, 4, 5, generator=torch.Generator().manual_seed(5))
    x = noise * norm.running_var.sqrt().view(6, 1, 1) + norm.running_mean.view(6, 1, 1)
    means = expected_inputs(model, x[:1])
    assert list(means) == ["1", "2"]
    int4 = Scheme(Cast(ov.formats.get("INT4"), PerTensor()))
    new = quantized(model, int4)
    with torch.no_grad():
        error = (model(x) - new(x)).mean((0, 2, 3))
    shift = correct_biases_without_data_(new, model, means)["2"]
    assert torch.allclose(shift.float(), error, atol=0.05 * float(error.abs().max()))
    assert error.abs().max() > 1e-3
    with torch.no_grad():
        assert (model(x) - new(x)).mean((0, 2, 3)).abs().max() < 0.05 * float(error.abs().max())


def test_without_data_in_a_whole_model():
    exact = NETWORKS["mobilenet"]()
    means = expected_inputs(exact, images())
    assert {"3.layers.0", "3.layers.3", "3.layers.6"} <= set(means) and not {"0", "4.layers.0"} & set(means)
    fold_batch_norms_(exact, images())
    model = quantized(exact)
    before = biases(model)
    shifts = correct_biases_without_data_(model, exact, means)
    assert set(shifts) == set(means) & set(layers(model))
    changed = {name for name, bias in biases(model).items() if not torch.equal(bias, before[name])}
    assert changed == set(shifts)


def test_without_data_for_linear_layers():
    exact = NETWORKS["perceptron"]()
    means = expected_inputs(exact, images())
    assert means["4"].shape == (1, 33) and means["7"].shape == (1, 20)
    model = quantized(exact)
    shifts = correct_biases_without_data_(model, exact, means, new_biases=False)
    assert list(shifts) == ["7"]
    error = (exact[7].weight - model[7].weight).double() @ means["7"][0]
    assert torch.allclose(shifts["7"], error)
