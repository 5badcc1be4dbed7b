"""The 8-bit linear layer: what it computes, and that nothing torch does to modules changes its codes."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import pytorch_utils

import octavo as ov
from octavo import Cast, OctavoError, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from octavo.core import schemes
from octavo.core.cast import quantize_scaled, quantize_unchecked
from octavo.core.scaling import scale_of_range
from octavo.nn.linear import QuantizedLinear

SCHEMES = {
    **{name: scheme for name, scheme in schemes.NAMES.items() if not scheme.static},
    "affine": Scheme(Cast("INT8", PerChannel(0), affine=True), Cast("UINT8", PerToken(), affine=True)),
    "per tensor": Scheme(Cast("E4M3FN"), Cast("E4M3FN")),
    "groups of 48 and 64": Scheme(Cast("INT8", PerGroup(48)), Cast("E3M4", PerGroup(64))),
    "input channels": Scheme(Cast("INT8", PerChannel(1)), Cast("INT8", PerToken())),
    "FP16 inputs": Scheme(Cast("INT8", PerChannel(0)), Cast("FP16", PerToken())),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(scheme="int8-dynamic", inputs=100, outputs=24, bias=True, dtype=torch.float32):
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    return layer, QuantizedLinear.from_float(layer, SCHEMES[scheme])


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
    ours = QuantizedLinear.from_float(layer, SCHEMES["fp8-dynamic"])
    x = torch.randn(40, 9).T
    assert torch.equal(ours(x), ours(x.contiguous()))
    assert ours.codes.is_contiguous()
    same = nn.Linear(40, 12)
    same.load_state_dict(layer.state_dict())
    same = QuantizedLinear.from_float(same, SCHEMES["fp8-dynamic"])
    assert torch.equal(ours(x), same(x))


def test_the_other_way_round():
    layer, ours = make("int8-dynamic")
    theirs = pytorch_utils.Conv1D(24, 100)
    theirs.load_state_dict({"weight": layer.weight.T.contiguous(), "bias": layer.bias})
    turned = QuantizedLinear.from_float(theirs, SCHEMES["int8-dynamic"])
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
    fresh = QuantizedLinear.from_float(nn.Linear(100, 24), SCHEMES[name])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["int8-weight-only", "fp8-weight-only"])
@pytest.mark.filterwarnings("error")
def test_floats_get_their_gradient(name, dtype):
    """Few rows, many, and turned ones, which run in different ways: for adapters around a frozen model."""
    _, ours = make(name, dtype=dtype)
    for x in (torch.randn(2, 100), torch.randn(2, 8, 100), torch.randn(100, 8).T):
        x = x.to(dtype).requires_grad_()
        y = ours(x)
        assert torch.equal(y, ours(x.detach()))
        upstream = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, upstream)
        exact = upstream.double() @ ours.quantized_weight.dequantize(torch.float64)
        torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["int8-dynamic", "fp8-block", "llm-int8", "int8-group64"])
@pytest.mark.filterwarnings("error")
def test_codes_have_no_gradient(name):
    _, ours = make(name)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(5, 100, dtype=dtype)
        y = ours(x.clone().requires_grad_())
        assert not y.requires_grad
        assert torch.equal(y, ours(x))


def test_one_graph_with_a_gradient():
    _, ours = make("int8-weight-only")
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 100, requires_grad=True)
    assert torch.equal(compiled(x), ours(x))
    found, expected = (torch.autograd.grad(layer(x).sum(), x) for layer in (compiled, ours))
    assert torch.equal(found[0], expected[0])


def test_a_constant_input_scale():
    layer, _ = make()
    scheme = Scheme(Cast("INT8", PerTensor()), Cast("INT8", PerTensor(), ov.Constant(0.05)))
    ours = QuantizedLinear.from_float(layer, scheme)
    x = torch.randn(4, 100)
    torch.testing.assert_close(ours(x).double(), naive(layer, scheme, x), rtol=1e-5, atol=1e-5)


STATIC = {name: scheme for name, scheme in schemes.NAMES.items() if scheme.static}


@pytest.mark.parametrize("name", STATIC)
def test_calibrated_input_scales(name):
    scheme, layer = STATIC[name], nn.Linear(100, 24)
    x = torch.randn(2, 5, 100)
    scale, zero_point = scale_of_range(x.min(), x.max(), scheme.input.format, scheme.input.affine)
    weight = quantize_unchecked(layer.weight, scheme.weight)
    ours = QuantizedLinear.replacing(layer, weight, scheme, input_scale=scale, input_zero_point=zero_point)
    rows = quantize_scaled(x.view(10, 100), scheme.input, scale, zero_point).dequantize(torch.float64)
    expected = rows @ weight.dequantize(torch.float64).T + layer.bias.double()
    torch.testing.assert_close(ours(x).double().view(10, 24), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(x[:, :1])[0, 0], ours(x)[0, 0])  # whatever else is in the batch
    assert ours(10 * x).isfinite().all()  # beyond the range it saturates
    x[0, 0, 0] = math.inf
    assert not ours(x).isfinite().all()
    assert copy.deepcopy(ours).bfloat16().input_scale.dtype == torch.float32


def test_calibrated_scales_are_needed():
    layer = nn.Linear(4, 3)
    with pytest.raises(OctavoError, match="int8-static needs calibrated input scales"):
        QuantizedLinear.from_float(layer, schemes.INT8_STATIC)
    weight = quantize_unchecked(layer.weight, schemes.INT8_DYNAMIC.weight)
    with pytest.raises(OctavoError, match="int8-dynamic has no calibrated input scales"):
        QuantizedLinear.replacing(layer, weight, schemes.INT8_DYNAMIC, input_scale=torch.ones(1))


META = ("int8-dynamic", "int8-weight-only", "fp8-cscale", "w8a16")


@pytest.mark.parametrize("name", META)
@pytest.mark.parametrize("part", ["bias", "scale", "codes", "input"])
def test_half_on_meta(name, part):
    """torch would compute with what is not there, and give a result."""
    ours = QuantizedLinear.from_float(nn.Linear(100, 24), schemes.get(name))
    x = torch.randn(4, 100)
    if part == "input":
        x = x.to("meta")
    else:
        setattr(ours, part, getattr(ours, part).to("meta"))
    with pytest.raises(OctavoError, match=r"QuantizedLinear\(in_features=100.* on meta"):
        ours(x)
    assert ours.to("meta")(x.to("meta")).is_meta


def test_formats_tables_move_with_the_layer():
    """All that the one call takes is a buffer: nothing of the plan is a tensor that stays behind."""
    for name in ("fp8-dynamic", "fp8-cscale", "int8-weight-only", "int8-static"):
        scheme = schemes.get(name)
        layer = nn.Linear(16, 8)
        calibrated = {"input_scale": torch.ones(1)} if scheme.static else {}
        weight = quantize_unchecked(layer.weight, scheme.weight)
        ours = QuantizedLinear.replacing(layer, weight, scheme, **calibrated)
        assert not any(isinstance(value, torch.Tensor) for value in vars(ours.plan).values())
        assert all(tensor.is_meta for tensor in copy.deepcopy(ours).to("meta").buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8-cscale", "smoothquant-o2"])
def test_one_scale_for_all_rows_in_one_call(name, dtype, monkeypatch):
    """The long way's numbers, without going it."""
    scheme = schemes.get(name)
    ours = QuantizedLinear.from_float(nn.Linear(100, 24).to(dtype), scheme)
    for shape in [(1, 100), (100,), (5, 100), (2, 3, 100), (0, 100)]:
        x = torch.randn(shape).to(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(ours, "plan", None)
            expected = ours(x)
        with monkeypatch.context() as patch:
            patch.setattr(ours, "quantize_input", None)
            assert torch.equal(ours(x), expected)


def test_one_graph_with_one_scale_for_all_rows():
    ours = QuantizedLinear.from_float(nn.Linear(16, 8), schemes.SMOOTHQUANT_O2)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (1, 2, 5):
        x = torch.randn(rows, 16)
        assert torch.equal(compiled(x), ours(x))
