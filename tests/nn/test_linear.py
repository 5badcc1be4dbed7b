"""The 8-bit linear layer: what it computes, and that nothing torch does to modules changes its codes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import octavo as ov
from octavo import Cast, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from octavo.core import schemes
from octavo.core.cast import quantize_unchecked
from octavo.nn import linear
from octavo.nn.linear import QuantizedLinear

SCHEMES = {
    **schemes.NAMES,
    "affine": Scheme(Cast("INT8", PerChannel(0), affine=True), Cast("UINT8", PerToken(), affine=True)),
    "per tensor": Scheme(Cast("E4M3FN"), Cast("E4M3FN")),
    "groups of 48 and 64": Scheme(Cast("INT8", PerGroup(48)), Cast("E3M4", PerGroup(64))),
    "input channels": Scheme(Cast("INT8", PerChannel(1)), Cast("INT8", PerToken())),
    "FP16 inputs": Scheme(Cast("INT8", PerChannel(0)), Cast("FP16", PerToken())),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(scheme="int8-dynamic", inputs=100, outputs=24, bias=True, dtype=torch.float32):
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    return layer, linear.from_float(layer.weight, layer.bias, SCHEMES[scheme])


def naive(layer, scheme, x):
    """Quantize both sides, dequantize both, multiply in float64."""
    weight = quantize_unchecked(layer.weight.detach(), scheme.weight, layer.weight.dtype).dequantize(torch.float64)
    rows = x.reshape(-1, layer.in_features)
    if scheme.input is not None:
        rows = quantize_unchecked(rows, scheme.input).dequantize(torch.float64)
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(rows.double(), weight, bias).view(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_equals_the_naive_product(name, bias, dtype):
    layer, ours = make(name, bias=bias, dtype=dtype)
    for shape in ((3, 5, 100), (7, 100), (100,), (0, 100), (1, 1, 1, 100)):
        x = torch.randn(shape).to(dtype)
        y = ours(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 24)
        expected = naive(layer, SCHEMES[name], x)
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 2e-6)
        weight_only = SCHEMES[name].input is None  # there the weight itself is rounded to the dtype
        slack = rounding * (4 if weight_only else 1)
        largest = expected.abs().amax().item() if y.numel() else 0.0
        assert bool(((y.double() - expected).abs() <= slack * (expected.abs() + largest)).all())


@pytest.mark.parametrize(("name", "floor"), [("int8-dynamic", 30), ("int8-group64", 36), ("fp8-dynamic", 20)])
def test_close_to_float(name, floor):
    layer, ours = make(name, 256, 64)
    x = torch.randn(50, 256)
    assert ov.sqnr(layer(x), ours(x)) > floor
    one = make(name.replace("dynamic", "weight-only") if "dynamic" in name else "int8-weight-only", 256, 64)
    assert ov.sqnr(one[0](x), one[1](x)) > floor


def test_rows_do_not_see_each_other():
    """A scale a token: what stands beside a row in the batch cannot change it."""
    _, ours = make("int8-dynamic")
    x = torch.randn(6, 100)
    wild = torch.cat([x, torch.full((1, 100), 1e4)])
    assert torch.equal(ours(wild)[:6], ours(x))
    assert torch.equal(ours(x)[2:3], ours(x[2:3]))


def test_nan_in_a_row_stays_there():
    _, ours = make("int8-dynamic")
    x = torch.randn(4, 100)
    x[1, 50] = float("inf")
    y = ours(x)
    assert y.isnan().all(1).tolist() == [False, True, False, False]


def test_layouts_of_input_and_weight():
    layer = nn.Linear(40, 12)
    layer.weight = nn.Parameter(torch.randn(40, 12).T)  # not contiguous
    ours = linear.from_float(layer.weight, layer.bias, SCHEMES["fp8-dynamic"])
    x = torch.randn(40, 9).T
    assert torch.equal(ours(x), ours(x.contiguous()))
    assert ours.codes.is_contiguous()
    same = linear.from_float(layer.weight.detach().contiguous(), layer.bias, SCHEMES["fp8-dynamic"])
    assert torch.equal(ours(x), same(x))


def test_the_other_way_round():
    layer, ours = make("int8-dynamic")
    turned = linear.from_float(layer.weight.T.contiguous(), layer.bias, SCHEMES["int8-dynamic"], transposed=True)
    x = torch.randn(5, 100)
    assert torch.equal(turned(x), ours(x))
    assert turned.weight.shape == (100, 24)
    assert torch.equal(turned.weight, ours.weight.T)


def test_the_weight_can_be_read():
    layer, ours = make("int8-dynamic", dtype=torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours.weight, ours.quantized_weight.dequantize())
    assert ov.sqnr(layer.weight, ours.weight) > 38


def test_frozen():
    _, ours = make()
    assert list(ours.parameters()) == []
    assert not ours.bias.requires_grad
    assert not ours(torch.randn(3, 100)).requires_grad
    assert not ours.weight.requires_grad


@pytest.mark.parametrize("name", ["int8-dynamic", "affine", "fp8-block", "e2m5-weight-only"])
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.bfloat16().float(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.train(),
        lambda m: m.requires_grad_(True),
        lambda m: m.share_memory(),
        copy.deepcopy,
    ],
)
def test_codes_and_scales_survive(name, move):
    _, ours = make(name)
    before = {
        n: None if t is None else t.clone() for n, t in ours.quantized_weight.__dict__.items() if torch.is_tensor(t)
    }
    x = torch.randn(4, 100)
    y = ours(x)
    moved = move(ours)
    assert isinstance(moved, QuantizedLinear)
    for n, t in before.items():
        after = getattr(moved.quantized_weight, n)
        assert after.dtype == t.dtype
        assert torch.equal(after, t)
    rounded = moved.bias.float()
    again = moved(x)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, y, rtol=1e-3, atol=2e-3 if not torch.equal(rounded, ours.bias.float()) else 5e-3)


def test_dtype_follows():
    _, ours = make()
    assert ours.dtype == torch.float32
    ours.to(torch.bfloat16)
    assert ours.dtype == ours.bias.dtype == ours.weight.dtype == torch.bfloat16
    assert ours.scale.dtype == torch.float32
    assert nn.Sequential(ours).half()[0].dtype == torch.float16


def test_meta():
    _, ours = make("affine")
    moved = copy.deepcopy(ours).to("meta")
    assert moved.codes.is_meta
    assert moved.codes.dtype == ours.codes.dtype
    assert moved.scale.dtype == torch.float32


@pytest.mark.parametrize("name", SCHEMES)
def test_state_dict_round_trip(name):
    _, ours = make(name)
    fresh = linear.empty(24, 100, True, SCHEMES[name], torch.float32)
    state = ours.state_dict()
    assert set(state) == {"codes", "scale", "bias"} | ({"zero_point"} if name == "affine" else set())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 100)
    assert torch.equal(fresh(x), ours(x))


def test_deepcopy_is_independent():
    _, ours = make()
    twin = copy.deepcopy(ours)
    twin.codes.zero_()
    assert bool(ours.codes.any())


def test_repr():
    _, ours = make("fp8-dynamic", bias=False)
    assert repr(ours) == "QuantizedLinear(in_features=100, out_features=24, bias=False, fp8-dynamic)"


def test_autocast_leaves_the_codes_alone():
    _, ours = make()
    x = torch.randn(4, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(x)
    assert torch.equal(inside, ours(x))


def test_a_constant_input_scale():
    layer, _ = make()
    scheme = Scheme(Cast("INT8", PerTensor()), Cast("INT8", PerTensor(), ov.Constant(0.05)))
    ours = linear.from_float(layer.weight, layer.bias, scheme)
    x = torch.randn(4, 100)
    torch.testing.assert_close(ours(x).double(), naive(layer, scheme, x), rtol=1e-5, atol=1e-5)
