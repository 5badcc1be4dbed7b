"""Simulated 8 bits, in place and not, against codes that are made and decoded again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo as ov
from octavo.core import fake_quantize as module
from octavo.core.cast import quantize_unchecked
from octavo.core.formats import eight_bit

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRANULARITIES = [
    *(ov.PerTensor(), ov.PerToken(), ov.PerGroup(7), ov.PerGroup(1), ov.PerGroup(1000)),
    *(ov.PerChannel(0), ov.PerChannel(1), ov.PerChannel(-1), ov.PerBlock(3, 5), ov.PerBlock(128, 128)),
]
SHAPES = [(6, 40), (3, 7, 10), (2, 3, 4, 5), (1, 1), (5, 1), (1, 9)]


def same(actual, expected):
    """Bitwise equality, any NaN equal to any other."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    wrong = (actual.contiguous().view(bits) != expected.contiguous().view(bits)) & ~(actual.isnan() & expected.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} differ: {actual[wrong][:5]} for {expected[wrong][:5]}"


def check(x, how):
    expected = quantize_unchecked(x, how).dequantize(x.dtype)
    same(ov.fake_quantize(x, how), expected)
    y = x.clone()
    assert ov.fake_quantize_(y, how) is y
    same(y, expected)


def casts(fmt):
    for scale in (ov.Current(), ov.Current(power_of_two=True), ov.Constant(0.02)):
        yield ov.Cast(fmt, scale=scale)
        if isinstance(fmt, ov.formats.IntegerFormat):
            yield ov.Cast(fmt, scale=scale, affine=True)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("fmt", ["E4M3FN", "E5M2FNUZ", "INT8", "UINT8"])
def test_is_quantizing_and_back(fmt, granularity):
    torch.manual_seed(0)
    for plain in casts(ov.formats.get(fmt)):
        how = ov.Cast(fmt, granularity, plain.scale, affine=plain.affine)
        for number, shape in enumerate(SHAPES):
            x = torch.randn(shape) * torch.randn(shape).exp()
            x.view(-1)[0] = -0.0
            check(x, how)
            check(x.to(FLOATS[number % 3 + 1]), how)


@pytest.mark.parametrize("fmt", [*eight_bit(), ov.formats.INT4, ov.formats.E2M3, ov.formats.FP16], ids=str)
def test_every_format(fmt):
    for how in casts(fmt):
        for dtype in FLOATS:
            check(torch.randn(11, 30).to(dtype), how)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    name=st.sampled_from(["E4M3FN", "E5M2", "HFP8_143", "INT8", "UINT8"]),
    size=st.integers(1, 12),
    affine=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    exponent=st.integers(-44, 38),
    seed=st.integers(0, 2**32),
)
def test_any_shape_and_size(shape, name, size, affine, dtype, exponent, seed):
    affine = affine and "INT" in name
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent).to(dtype)
    granularities = [ov.PerTensor(), ov.PerToken(), ov.PerGroup(size)]
    granularities += [ov.PerChannel(axis) for axis in range(len(shape))]
    granularities += [ov.PerBlock(size, 3)] if len(shape) > 1 else []
    for granularity in granularities:
        check(x, ov.Cast(name, granularity, affine=affine))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_what_is_not_finite_poisons_its_block(granularity, bad):
    x = torch.randn(6, 40)
    x[2, 11] = bad
    for how in (*casts(ov.formats.E4M3FN), *casts(ov.formats.INT8)):
        check(x, ov.Cast(how.format, granularity, how.scale, affine=how.affine))


@pytest.mark.parametrize("rounding", ov.ops.ROUNDINGS)
def test_every_rounding(rounding):
    x = torch.randn(9, 50)
    how = ov.Cast("E4M3FN", ov.PerGroup(8), rounding=rounding)
    torch.manual_seed(3)
    expected = quantize_unchecked(x, how).dequantize()
    torch.manual_seed(3)
    y = x.clone()
    same(ov.fake_quantize_(y, how), expected)


def test_large_tensors_are_cut_and_threads_change_nothing():
    x = torch.randn(3, 2 * module.LONGEST + 77)
    for how in (ov.Cast("E4M3FN"), ov.Cast("INT8", ov.PerToken(), affine=True), ov.Cast("INT8", ov.PerGroup(5000))):
        check(x, how)
        y, threads = ov.fake_quantize(x, how), torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            same(ov.fake_quantize(x, how), y)
        finally:
            torch.set_num_threads(threads)


def test_what_does_not_lie_in_rows():
    whole = torch.randn(20, 30)
    for view in (
        whole.t(),
        whole[:, 3:17],
        whole[::2],
        whole[..., 4],
        torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last),
    ):
        for how in (ov.Cast("E4M3FN"), ov.Cast("INT8", ov.PerToken()), ov.Cast("INT8", ov.PerChannel(0), affine=True)):
            check(view.clone(memory_format=torch.preserve_format), how)
    before = whole.clone()
    ov.fake_quantize_(whole[:, 3:17], ov.Cast("E4M3FN"))  # through the view
    same(whole[:, 3:17], ov.fake_quantize(before[:, 3:17], ov.Cast("E4M3FN")))
    assert torch.equal(whole[:, :3], before[:, :3]) and torch.equal(whole[:, 17:], before[:, 17:])


@pytest.mark.parametrize("change", [lambda x: ov.cast_(x, "E4M3FN"), lambda x: ov.fake_quantize_(x, ov.Cast("E4M3FN"))])
def test_in_place_is_what_torch_calls_in_place(change):
    leaf = torch.randn(4, 4, requires_grad=True)
    before = leaf.detach().clone()
    for part in (leaf, leaf[1]):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            change(part)
    assert torch.equal(leaf, before)
    with torch.no_grad():
        assert change(leaf) is leaf
    assert leaf.is_leaf and leaf.requires_grad and not torch.equal(leaf, before)
    with pytest.raises(RuntimeError, match="single memory location"):
        change(torch.zeros(1).expand(5))
    saved = torch.randn(3, requires_grad=True)
    squared = (y := saved * 1.3) ** 2
    change(y)  # which the backward pass of the square needs as it was
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    x = torch.randn(3)
    version = x._version
    change(x)
    assert x._version > version
    for wrong in (torch.ones(3, dtype=torch.int32), torch.ones(3, device="meta")):
        with pytest.raises(ov.OctavoError):
            change(wrong)


def test_gradients():
    x = torch.randn(5, requires_grad=True)
    y = x * 2
    assert ov.fake_quantize_(y, ov.Cast("INT8")).requires_grad
    y.sum().backward()
    assert x.grad.tolist() == [2.0] * 5
    x.grad = None
    ov.cast_(y := x * 2, "E4M3FN")
    y.sum().backward()
    assert x.grad.tolist() == [0.0] * 5
    assert ov.fake_quantize_(x, None) is x


def test_cast_in_place():
    torch.manual_seed(0)
    whole = torch.randn(3, 8, 5) * 100
    for x in (whole, whole.permute(2, 0, 1), whole[:, ::2], whole[0, 0, 0], whole[:0]):
        for dtype in FLOATS:
            for fmt in (*eight_bit(), ov.formats.UINT8, ov.formats.E8M0, ov.formats.float_format(4, 3, 7.5)):
                for overflow in ("saturate", "nonsaturating"):
                    if overflow == "nonsaturating" and not (fmt.has_infinity or fmt.has_nan):
                        continue
                    y = x.clone(memory_format=torch.preserve_format).to(dtype)
                    expected = ov.cast(y, fmt, overflow=overflow)
                    assert ov.cast_(y, fmt, overflow=overflow) is y
                    same(y, expected)
            y = x.clone(memory_format=torch.preserve_format).to(dtype)
            drawn = [torch.Generator().manual_seed(1) for _ in range(2)]
            expected = ov.cast(y, "INT8", "stochastic", generator=drawn[0])
            same(ov.cast_(y, "INT8", "stochastic", generator=drawn[1]), expected)


def test_what_does_not_fit_leaves_the_tensor_as_it_was():
    x = torch.tensor([1.06, 1000.0])
    with pytest.raises(ov.OctavoError, match="1 of 2 values do not fit"):
        ov.cast_(x, "E4M3FN", overflow="error")
    assert torch.equal(x, torch.tensor([1.06, 1000.0]))
    with pytest.raises(ov.OctavoError, match="neither infinity nor NaN"):
        ov.cast_(x, "INT8", overflow="nonsaturating")
    with pytest.raises(ov.OctavoError, match="rounding is one of"):
        ov.cast_(x, "INT8", rounding="sideways")


def test_subclasses_stay_what_they_are():
    class Named(torch.Tensor):
        pass

    x = torch.randn(4, 6)
    for how in (ov.Cast("INT8"), ov.Cast("E4M3FN", ov.PerToken())):
        y = x.clone().as_subclass(Named)
        assert type(ov.fake_quantize_(y, how)) is Named
        same(y.as_subclass(torch.Tensor), ov.fake_quantize(x, how))
    y = torch.nn.Parameter(x.clone())
    with torch.no_grad():
        ov.fake_quantize_(y, ov.Cast("INT8"))
    same(y.detach(), ov.fake_quantize(x, ov.Cast("INT8")))


def test_no_temporaries():
    x = torch.randn(1 << 20)
    for change in (lambda: ov.cast_(x, "E4M3FN"), lambda: ov.fake_quantize_(x, ov.Cast("E4M3FN"))):
        change()  # compiles
        with torch.profiler.profile(profile_memory=True) as profile:
            change()
        assert sum(event.self_cpu_memory_usage > 1 << 16 for event in profile.events()) == 0


@pytest.mark.parametrize("granularity", [ov.PerTensor(), ov.PerToken(), ov.PerChannel(1)], ids=str)
def test_compiles_whole(granularity):
    torch.compiler.reset()

    float8, int8 = ov.Cast("E4M3FN", granularity), ov.Cast("INT8", granularity)

    def f(x):
        y = x * 2
        ov.fake_quantize_(y, float8)
        z = y + ov.fake_quantize(x, int8)
        ov.cast_(z, "E5M2")
        return z

    x = torch.randn(6, 9)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
