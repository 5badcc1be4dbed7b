"""A layer in one call equals its steps: bit for bit where inputs are codes, else within the bound of FP32 sums."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo as ov
from octavo import ops
from octavo.core.cast import quantize_unchecked
from octavo.core.granularity import PerBlock, PerGroup, PerTensor, PerToken
from octavo.core.layer import plan, scale_of_all
from octavo.core.matmul import multiply
from octavo.core.scaling import Constant, Current, Static

FORMATS = ("INT8", "E4M3FN", "E5M2", "E3M4", "E2M5", "E4M3FNUZ", "HFP8_143")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(weight, input, n, k, bias=True, dtype=torch.float32, seed=0, granularity=None):
    cast = ov.Cast(ov.formats.get(weight), granularity or ov.PerChannel(0))
    q = ov.quantize(numbers(n, k, dtype=dtype, seed=seed), cast)
    return q, input, numbers(n, dtype=dtype, seed=seed + 1) if bias else None


def in_one_call(x, q, how, bias, scale=None, zero=None):
    p, constants = plan(q, how)
    weight = ops.Weight(q.codes, q.scale, p.rows, p.columns, constants.table)
    if how is None:
        return ops.linear_weight_only(x, weight, bias)
    if p.whole:
        scale, zero = (constants.input_constant, None) if how.scale == Constant(0.02) else scale_of_all(x, how)
    given = (constants.input_table, scale, zero, p.affine, p.power_of_two)
    return ops.linear(x, weight, bias, p.group, p.numbers, *given)


def step_by_step(x, q, how, bias, scale=None, zero=None):
    rows = x.reshape(-1, x.shape[-1])
    a = quantize_unchecked(rows, how) if scale is None else ov.quantize_scaled(rows, how, scale, zero)
    return multiply(a, q, bias, x.dtype).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("weight", "input"), [*itertools.product(FORMATS[:4], repeat=2), *((f, f) for f in FORMATS[4:])]
)
def test_equals_its_steps(weight, input, dtype):
    how = ov.Cast(ov.formats.get(input), PerToken())
    for m, n, k in [(1, 1, 1), (1, 33, 17), (2, 16, 100), (4, 7, 576), (5, 49, 64), (70, 100, 130)]:
        q, _, bias = layer(weight, input, n, k, m % 2 == 0, dtype)
        x = numbers(m, k, dtype=dtype, seed=3) * 5
        assert torch.equal(in_one_call(x, q, how, bias), step_by_step(x, q, how, bias))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_equals_its_steps_in_blocks(data):
    draw = data.draw
    k, n, m = draw(st.integers(1, 200)), draw(st.integers(1, 60)), draw(st.integers(1, 60))
    group = draw(st.integers(1, 64))
    inputs = draw(st.sampled_from([PerToken(), PerGroup(group), PerGroup(2 * group)]))
    weights = draw(
        st.sampled_from([PerTensor(), ov.PerChannel(0), PerGroup(group), PerBlock(draw(st.integers(1, 40)), group)])
    )
    formats = [ov.formats.get(draw(st.sampled_from(FORMATS))) for _ in range(2)]
    scale = Current(power_of_two=draw(st.booleans()))
    how = ov.Cast(formats[0], inputs, scale)
    dtype = draw(st.sampled_from(DTYPES))
    q, _, bias = layer(formats[1].name, None, n, k, draw(st.booleans()), dtype, granularity=weights)
    x = numbers(m, k, dtype=dtype, seed=draw(st.integers(0, 99)))
    if plan(q, how) is not None:  # groups that do not nest take the long way
        assert torch.equal(in_one_call(x, q, how, bias), step_by_step(x, q, how, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "affine"), [("INT8", False), ("INT8", True), ("UINT8", True), ("E4M3FN", False)])
def test_static_scales(format, affine, dtype):
    how = ov.Cast(ov.formats.get(format), PerTensor(), Static(), affine=affine)
    q, _, bias = layer("INT8" if affine else format, None, 40, 90, True, dtype)
    scale, zero = torch.tensor([0.03]), torch.tensor([11], dtype=torch.int32) if affine else None
    for m in (1, 3, 33):
        x = numbers(m, 90, dtype=dtype)
        assert torch.equal(in_one_call(x, q, how, bias, scale, zero), step_by_step(x, q, how, bias, scale, zero))
    assert scale.item() == torch.tensor(0.03).item()  # a broken batch must not spoil the layer's scale
    x[0, 0] = torch.nan
    assert in_one_call(x, q, how, bias, scale, zero).isnan().all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [Constant(0.02), Current(), Current(power_of_two=True)], ids=str)
@pytest.mark.parametrize(("format", "affine"), [("INT8", False), ("INT8", True), ("E4M3FNUZ", False), ("E3M4", False)])
def test_one_scale_for_all_rows(format, affine, scale, dtype):
    """Constant or of the rows at hand: no long way, and no bit that differs from it, whatever breaks."""
    how = ov.Cast(ov.formats.get(format), PerTensor(), scale, affine=affine)
    q, _, bias = layer(format, None, 40, 90, True, dtype, granularity=PerTensor())
    if affine and scale == Constant(0.02):
        assert plan(q, how) is None  # its zero points are zero, and nobody asks for it
        return
    for shape in [(1, 90), (90,), (3, 90), (2, 17, 90), (1, 1, 90)]:
        x = numbers(*shape, dtype=dtype) * 3
        for broken in (0.0, torch.inf, torch.nan):
            x[..., 0, 5].add_(broken) if x.dim() > 1 else x[5].add_(broken)
            found, expected = in_one_call(x, q, how, bias), step_by_step(x, q, how, bias)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            assert found.isnan().all() == (broken != 0)
    assert in_one_call(x[:0] if x.dim() > 1 else x, q, how, bias).numel() == 0
    assert torch.equal(in_one_call(numbers(2, 90, dtype=dtype) * 0, q, how, None), torch.zeros(2, 40, dtype=dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("format", FORMATS)
def test_weight_only(format, dtype):
    for m, n, k in itertools.product((1, 3, 40), (1, 33), (1, 17, 100, 576)):
        for granularity in (ov.PerChannel(0), PerGroup(48), PerBlock(20, 64), PerTensor()):
            q, _, bias = layer(format, None, n, k, True, torch.float32, granularity=granularity)
            x = numbers(m, k, dtype=dtype, seed=5)
            y = in_one_call(x, q, None, bias.to(dtype))
            assert y.dtype == dtype
            weight, exact = q.dequantize(torch.float64), x.double()
            truth = exact @ weight.T + bias.to(dtype).double()
            slack = exact.abs() @ weight.abs().T + bias.abs().double()
            bound = (k + 8) * 2.0**-24 * slack + torch.finfo(dtype).eps * truth.abs() / 2 + torch.finfo(dtype).tiny
            assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("value", [1e-40, 2.0**-127, 0.0, float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("point", [0, 3, -128, 5000, -100_000])
def test_given_scales_of_any_size(value, point):
    """Written out in numpy: a quotient is a quotient, also where the scale has no reciprocal."""
    scale, zero = torch.tensor([value]), torch.tensor([point], dtype=torch.int32)
    how = ov.Cast(ov.formats.INT8, PerTensor(), Static(), affine=True)
    q, _, _ = layer("INT8", None, 5, 70, False)
    x = numbers(3, 70) * torch.tensor([[1.0], [2.0**-128], [0.0]])
    with np.errstate(all="ignore"):
        codes = np.rint(x.numpy() / np.float32(value)).clip(-8e6, 8e6) + np.float32(point)
        codes = np.nan_to_num(codes.clip(-128, 127)).astype(np.int64)
        sums = ((codes - point) @ q.codes.long().numpy().T).astype(np.float32)
        expected = torch.from_numpy(sums * np.float32(value) * q.scale.numpy().T)
    torch.testing.assert_close(in_one_call(x, q, how, None, scale, zero), expected, rtol=0, atol=0, equal_nan=True)


def test_blocks_longer_than_sums_of_integers():
    q, _, _ = layer("INT8", None, 3, 200_000, granularity=PerGroup(100_000))
    x = numbers(2, 200_000, dtype=torch.bfloat16)
    p, constants = plan(q, None)
    weight = ops.Weight(q.codes, q.scale, p.rows, p.columns, constants.table)
    truth = (x.double() @ q.dequantize(torch.float64).T).bfloat16()
    for call in (torch.ops.octavo.linear_weight_only, ops.reference.linear_weight_only):
        torch.testing.assert_close(call(x, *weight, None), truth, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("rows", [2, 8])
def test_autocast_leaves_weight_only_alone(rows):
    q, _, bias = layer("INT8", None, 24, 32)
    for x in (numbers(rows, 32), numbers(32, rows).T, numbers(rows, 32).double()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = in_one_call(x, q, None, bias)
        assert torch.equal(inside, in_one_call(x, q, None, bias))


def test_shapes_and_strides():
    how = ov.Cast(ov.formats.INT8, PerToken())
    q, _, bias = layer("INT8", None, 24, 32)
    x = numbers(2, 5, 64)[..., ::2]
    for call in (lambda t: in_one_call(t, q, how, bias), lambda t: in_one_call(t, q, None, bias)):
        torch.testing.assert_close(call(x), call(x.contiguous()), rtol=1e-6, atol=1e-6)
        assert call(x[:, :0]).shape == (2, 0, 24)
        assert call(x[0, 0]).shape == (24,)
        assert call(x.transpose(0, 1)).shape == (5, 2, 24)


def test_results_do_not_depend_on_the_number_of_threads():
    q, _, bias = layer("INT8", None, 300, 700)
    how, before = ov.Cast(ov.formats.INT8, PerToken()), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [[in_one_call(numbers(m, 700), q, how, bias) for m in (1, 4, 100)]]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic", "int8-weight-only", "int8-group64"])
def test_without_kernels_the_same(scheme, monkeypatch):
    """What the fused kernels refuse goes by its steps: float64 goes the long way, and both agree."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(128, 32))
    ov.quantize_(made, scheme)
    x = torch.randn(3, 128)
    torch.testing.assert_close(made(x), made(x.double()).float(), rtol=1e-5, atol=1e-5)
    names = ("linear", "linear_weight_only")
    steps = {name: getattr(torch.ops.octavo, f"{name}_by_steps") for name in names}
    fast = made(x)
    for name in names:
        monkeypatch.setattr(torch.ops.octavo, name, steps[name])
    torch.testing.assert_close(made(x), fast, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (16,), (0, 16)])
def test_opcheck(dtype, shape):
    q, _, bias = layer("E4M3FN", None, 8, 16, True, dtype)
    x = numbers(*shape, dtype=dtype)
    p, constants = plan(q, ov.Cast(ov.formats.INT8, PerGroup(8)))
    weight = ops.Weight(q.codes, q.scale, p.rows, p.columns, constants.table)
    arguments = (x, *weight, bias, constants.input_table, None, None, p.group, p.affine, p.power_of_two, *p.numbers)
    torch.library.opcheck(torch.ops.octavo.linear.default, arguments)
    torch.library.opcheck(torch.ops.octavo.linear_weight_only.default, (x, *weight, bias))
    rows = x.reshape(-1, 16)
    torch.library.opcheck(torch.ops.octavo.quantize_rows.default, (rows, 8, None, None, False, False, *p.numbers))


def test_one_graph_for_any_number_of_rows():
    made = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    ov.quantize_(made, {"0": "int8-dynamic", "2": "fp8-weight-only"})
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(made, backend=count, fullgraph=True, dynamic=True)
    for m in (2, 3, 7, 64):
        x = numbers(m, 16, seed=m)
        assert torch.equal(compiled(x), made(x))
    assert len(graphs) == 1
