"""Which modules can be replaced, and how they are."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import octavo as ov
from octavo import OctavoError
from octavo.core import schemes
from octavo.nn import swap
from octavo.nn.linear import QuantizedLinear
from tests.nn import models


def obstacles(model):
    return {layer.name: layer.obstacle for layer in swap.layers(model)}


def test_what_is_a_layer():
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.LayerNorm(4),
        nn.Embedding(5, 4),
        nn.EmbeddingBag(5, 4),
        nn.Conv1d(4, 4, 1),
        nn.ConvTranspose3d(4, 4, 1),
        nn.Bilinear(2, 2, 2),
        nn.LSTM(4, 4),
    )
    assert obstacles(model) == {
        "0": None,
        "2": "no matrix",
        **dict.fromkeys("3456"),
        "7": "Bilinear has no 8-bit form",
        "8": "LSTM has no 8-bit form",
    }


@pytest.mark.parametrize(
    "layer", [nn.LazyLinear(3), nn.LazyConv2d(4, 3), nn.LazyConvTranspose1d(4, 3), nn.LazyBatchNorm1d()]
)
def test_lazy_layers(layer):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    summary = ov.quantize_(model, "int8-dynamic")
    assert "no shape yet" in {x.name: x.reason for x in summary.left}["0"]
    assert summary.layers[0].bytes_before <= 8


def test_a_lazy_layer_that_has_run():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    model(torch.randn(1, 5, 8, 8))
    assert obstacles(model) == {"0": None}


class Standardized(nn.Conv2d):
    """BiT's: the weight is standardized in forward."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(nn.functional.pad(x, (2, 0)), weight, bias)


def test_subclasses_of_convolutions():
    model = nn.Sequential(Standardized(4, 4, 3), Padded(4, 4, 3), type("Same", (nn.Conv3d,), {})(4, 4, 3))
    assert obstacles(model) == {
        "0": "Standardized overrides Conv2d.forward with something else",
        "1": "Padded overrides Conv1d._conv_forward with something else",
        "2": None,
    }
    model[2]._conv_forward = lambda *_: None
    assert "another forward" in obstacles(model)["2"]


def test_names_of_one_module():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    assert [layer.names for layer in swap.layers(model)] == [("a", "b.0"), ("c",)]
    layer = swap.layers(model)[0]
    new = QuantizedLinear.from_float(shared, schemes.INT8_DYNAMIC)
    swap.replace(model, layer, new)
    assert model["a"] is model["b"][0] is new
    assert model["c"] is not new
    assert obstacles(model) == {"a": "already quantized", "c": None}


def test_gpt2s_linears_are_turned():
    found = {layer.name: layer for layer in swap.layers(models.gpt2())}
    layer = found["transformer.h.0.mlp.c_fc"]
    assert layer.matrix.shape == layer.weight.T.shape
    assert layer.obstacle is None
    assert layer.kind == "Conv1D"
    assert found["lm_head"].matrix is found["lm_head"].weight


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Falcon's: a forward of its own that computes the same."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Adapted(nn.Linear):
    """A low-rank adapter whose update is half a percent."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.update = nn.Parameter(self.weight.detach() * 0.005)

    def forward(self, x):
        return super().forward(x) + x @ self.update.T


class Picky(nn.Linear):
    def forward(self, x):
        raise RuntimeError("three dimensions, please")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_subclasses_of_linear(dtype):
    model = nn.Sequential(Doubled(8, 8), Renamed(8, 8), Picky(8, 8), type("Same", (nn.Linear,), {})(8, 8)).to(dtype)
    found = obstacles(model)
    assert found["0"] == "Doubled overrides Linear.forward with something else"
    assert "Picky" in found["2"]
    assert found["1"] is None
    assert found["3"] is None


def test_a_small_adapter_is_not_rounding():
    assert "Adapted" in obstacles(nn.Sequential(Adapted(64, 64)))["0"]


def test_looking_calls_no_hooks():
    calls = []
    model = nn.Sequential(Renamed(4, 4))
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert obstacles(model) == {"0": None}
    assert calls == []


def test_a_forward_put_into_one_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = lambda x: x
    assert "forward" in obstacles(model)["0"]
    ov.quantize_(model, "int8-dynamic")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("spoil", [torch.nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_a_hook_computes(spoil):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    spoil(model[0])
    x = torch.randn(3, 8)
    summary = ov.quantize_(model, "int8-dynamic")
    assert [layer.name for layer in summary.left] == ["0"]
    assert "hook" in summary.left[0].reason
    assert model(x).isfinite().all()


def test_parametrized():
    model = nn.Sequential(*[parametrizations.weight_norm(nn.Linear(32, 32, bias=bool(i % 2))) for i in range(6)])
    x = torch.randn(5, 32)
    inner = [x]
    for layer in model:
        inner.append(layer(inner[-1]))
    weights = [layer.weight.detach().clone() for layer in model]
    assert obstacles(model) == {str(i): None for i in range(6)}
    summary = ov.quantize_(model, "int8-dynamic")
    for i, layer in enumerate(model):  # each its own weight, whatever address it was computed at
        assert ov.sqnr(weights[i], layer.weight) > 38
        assert ov.sqnr(inner[i + 1], layer(inner[i])) > 30
    assert sum(layer.bytes_before for layer in summary.layers) == summary.bytes_before
    assert sum(layer.bytes_after for layer in summary.layers) == summary.bytes_after


def test_weights_computed_in_one_place():
    """Two computed weights may well lie at one address, one after the other; here they always do."""
    place = torch.empty(8, 8)

    class Compute(nn.Module):
        def forward(self, weight):
            return place.copy_(weight.detach())

    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(3)])
    weights = [layer.weight.detach().clone() for layer in model]
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", Compute(), unsafe=True)
    ov.quantize_(model, "int8-dynamic")
    for layer, weight in zip(model, weights, strict=True):
        assert ov.sqnr(weight, layer.weight) > 35


def test_hooks_that_are_always_called_stay_so():
    model = nn.Sequential(nn.Linear(4, 4))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1), always_call=True)
    ov.quantize_(model, "int8-dynamic")
    with pytest.raises(ov.OctavoError, match=r"\[…, 4\], not torch.float32 \[2, 5\]"):
        model(torch.ones(2, 5))
    assert calls == [1]


def test_hooks_move_and_can_still_be_removed():
    model = nn.Sequential(nn.Linear(4, 4))
    calls = []
    handles = [
        model[0].register_forward_pre_hook(lambda m, a: calls.append("pre")),
        model[0].register_forward_hook(lambda m, a, y: calls.append("post")),
        model[0].register_forward_hook(lambda m, a, k, y: calls.append("kwargs"), with_kwargs=True),
        model[0].register_forward_hook(lambda m, a, y: y * 0, always_call=True),
    ]
    ov.quantize_(model, "int8-dynamic")
    assert isinstance(model[0], QuantizedLinear)
    assert not model(torch.ones(2, 4)).any()
    assert calls == ["pre", "post", "kwargs"]
    for handle in handles:
        handle.remove()
    assert model(torch.ones(2, 4)).any()
    assert calls == ["pre", "post", "kwargs"]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(training)
    ov.quantize_(model, "int8-dynamic")
    assert model.training == model[0].training == training


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_not_floats(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    assert obstacles(nn.Sequential(layer))["0"] == f"its weight is {str(dtype).removeprefix('torch.')}"


def attention_inputs():
    torch.manual_seed(3)
    x = torch.randn(2, 9, 32)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 6:] = True
    return x, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_transformer_encoder_keeps_to_the_slow_path(masked, grad):
    """torch's fused path reads linear1.weight itself; it must see that it cannot."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = attention_inputs()
    arguments = {"src_key_padding_mask": mask} if masked else {}
    with torch.set_grad_enabled(True):  # the slow path, for reference
        expected = model(x, **arguments).detach()
    summary = ov.quantize_(model, "int8-dynamic")
    assert len(summary.quantized) == 4
    with torch.set_grad_enabled(grad):
        y = model(x, **arguments).detach()
    layer = model.layers[0]  # whose output must be the same wherever torch might take its fused path
    with torch.no_grad():
        fused = layer(x, **arguments)
    assert ov.sqnr(layer(x, **arguments).detach()[~mask], fused[~mask]) > 80
    keep = ~mask if masked else torch.ones_like(mask)
    assert 25 < ov.sqnr(expected[keep], y[keep]) < 80


def test_one_encoder_layer_alone():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    x, _ = attention_inputs()
    with torch.no_grad():
        expected = layer(x)
        ov.quantize_(layer, {"linear2": "int8-dynamic"})
        y = layer(x)
    assert 25 < ov.sqnr(expected, y) < 80
    with torch.enable_grad():
        assert ov.sqnr(layer(x).detach(), y) > 80


def test_multihead_attention_keeps_its_float_weights():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, batch_first=True), "out": nn.Linear(32, 3)}).eval()
    x, _ = attention_inputs()
    with torch.no_grad():
        expected = model["attention"](x, x, x)[0]
        summary = ov.quantize_(model, "int8-dynamic")
        assert torch.equal(model["attention"](x, x, x)[0], expected)
    reasons = {layer.name: layer.reason for layer in summary.left}
    assert reasons["attention.out_proj"] == "nn.MultiheadAttention reads its weight directly"
    assert [layer.name for layer in summary.quantized] == ["out"]


def test_a_transformer_decoder():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, _ = attention_inputs()
    with torch.no_grad():
        expected = model(x, x)
        ov.quantize_(model, "fp8-dynamic")
        assert 20 < ov.sqnr(expected, model(x, x)) < 80


def test_a_bare_layer_cannot_replace_itself():
    layer = nn.Linear(4, 4)
    with pytest.raises(OctavoError, match="Sequential"):
        ov.quantize_(layer, "int8-dynamic")
    assert list(layer.children()) == []
