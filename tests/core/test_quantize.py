"""Quantizing with scales: against a loop over blocks, at the edges of the number range, and with NaN inside."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo as ov
from octavo import Cast, Constant, Current, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core import formats
from octavo.core.cast import quantize_unchecked
from octavo.core.granularity import scale_shape
from tests.core.test_granularity import blocks_of

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(-1), PerToken(), PerGroup(3), PerGroup(4), PerBlock(2, 3)]
EIGHT_BIT = [*formats.eight_bit(), formats.INT4, formats.E2M1, formats.E3M2, formats.E5M6, formats.INT16]
SHAPES = [(6, 8), (5, 7), (1, 1), (2, 3, 7), (2, 1, 3, 5), (3, 0), (0, 4)]


def naive(x, how, storage=torch.float32):
    """The documented rule, a block at a time: scale, codes, what they stand for."""
    fmt = how.format
    block = how.granularity.block(tuple(x.shape))
    scales = torch.empty(scale_shape(tuple(x.shape), block))
    zeros = torch.zeros_like(scales)
    result = torch.empty(x.shape)
    for index, elements in blocks_of(tuple(x.shape), block).items():
        inside = torch.stack([x[e] for e in elements]).float() if elements else torch.zeros(1)
        if isinstance(how.scale, Constant):
            scale = torch.tensor(how.scale.value)
        elif how.affine:
            low, high = inside.min().clamp(max=0), inside.max().clamp(min=0)
            scale = (high - low).clamp(min=1e-12) / (fmt.high - fmt.low)
        else:
            scale = inside.abs().max().clamp(min=1e-12) / fmt.max
            if how.scale.power_of_two:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(scale.item())))
        scale = scale.to(storage).float()
        scales[index] = scale
        if how.affine:
            low = inside.min().clamp(max=0)
            zeros[index] = (fmt.low - torch.round(low / scale)).clamp(fmt.low, fmt.high)
            codes = (torch.round(inside / scale) + zeros[index]).clamp(fmt.low, fmt.high)
            numbers = codes - zeros[index]
        elif isinstance(fmt, formats.IntegerFormat):
            numbers = torch.round(inside / scale).clamp(-fmt.high, fmt.high)
        else:
            numbers = ov.cast(inside / scale, fmt)
        for e, number in zip(elements, numbers, strict=False):
            result[e] = number * scale
    return scales, zeros, result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        Cast("E4M3FN"),
        Cast("E5M2"),
        Cast("E2M5"),
        Cast("INT8"),
        Cast("INT4"),
        Cast("INT8", affine=True),
        Cast("UINT8", affine=True),
        Cast("E4M3FN", scale=Current(power_of_two=True)),
        Cast("INT8", scale=Current(power_of_two=True)),
        Cast("E4M3FN", scale=Constant(0.02)),
        Cast("INT8", scale=Constant(0.02)),
    ],
    ids=str,
)
def test_equals_a_loop(how, granularity, shape, generator):
    how = Cast(how.format, granularity, how.scale, how.rounding, how.affine)
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(shape, generator=generator) + 0.5).to(dtype)
        q = ov.quantize(x, how)
        scales, zeros, numbers = naive(x, how)
        assert torch.equal(q.scale, scales)
        assert q.scale.dtype == torch.float32
        assert (q.zero_point is not None) == how.affine
        if how.affine:
            assert q.zero_point.dtype == torch.int32
            assert torch.equal(q.zero_point, zeros.int())
        assert q.codes.shape == x.shape
        assert q.codes.dtype == how.format.code_dtype
        assert q.dtype == dtype
        assert torch.equal(q.dequantize(torch.float32), numbers)
        assert torch.equal(q.dequantize(), numbers.to(dtype))
        assert torch.equal(ov.fake_quantize(x, how), q.dequantize())


@pytest.mark.parametrize("affine", [False, True])
def test_scalars(affine):
    q = ov.quantize(torch.tensor(-3.0), Cast("INT8", affine=affine))
    assert q.scale.shape == ()
    torch.testing.assert_close(q.dequantize(), torch.tensor(-3.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("fmt", EIGHT_BIT, ids=str)
def test_the_largest_becomes_the_largest(fmt, granularity, generator):
    x = torch.randn(6, 9, generator=generator) * 100
    q = ov.quantize(x, Cast(fmt, granularity))
    numbers = q.numbers()
    for elements in blocks_of((6, 9), q.block).values():
        assert max(abs(numbers[e].item()) for e in elements) == fmt.max
    if fmt is formats.INT8:
        assert q.codes.min() >= -127


def test_symmetric_integers_do_not_use_their_lowest_code():
    x = torch.tensor([-1.0, -0.9999999, 1.0, -5e3, 5e3])
    assert ov.quantize(x, Cast("INT8")).codes.min() == -127
    assert ov.quantize(x, Cast("INT4")).codes.min() == -7
    assert ov.quantize(x, Cast("INT8", scale=Constant(1.0))).codes.min() == -127
    assert ov.quantize(x, Cast("INT8", affine=True)).codes.min() == -128


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6),
    st.sampled_from(["INT8", "UINT8", "INT4", "INT16"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_zero_is_exact_and_errors_are_small(values, name, storage):
    x = torch.tensor([*values, 0.0])
    q = quantize_unchecked(x, Cast(name, affine=True), storage)
    y = q.dequantize()
    assert y[-1] == 0.0
    assert q.format.low <= q.zero_point.item() <= q.format.high
    slack = 1.01 if storage == torch.float32 else 1.01 + (q.format.high - q.format.low) * 2.0**-8
    assert bool(((x - y).abs() <= q.scale * slack + 1e-12).all())


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6),
    st.sampled_from(["INT8", "E4M3FN", "E5M2"]),
)
def test_symmetric_errors_are_small(values, name):
    x = torch.tensor(values)
    q = ov.quantize(x, Cast(name))
    y = q.dequantize()
    if name == "INT8":
        assert bool(((x - y).abs() <= q.scale * 0.5001 + 1e-12).all())
    else:  # half a unit in the last place, or half the smallest subnormal
        fmt = q.format
        bound = torch.maximum(x.abs() * fmt.epsilon / 2, q.scale * fmt.min_subnormal / 2)
        assert bool(((x - y).abs() <= bound * 1.0001).all())


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    "how",
    [Cast("E4M3FN"), Cast("INT8"), Cast("INT8", affine=True), Cast("E5M2", scale=Current(power_of_two=True))],
    ids=str,
)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros(how, granularity, storage):
    x = torch.zeros(4, 6)
    x[0, 0] = 1.0
    how = Cast(how.format, granularity, how.scale, affine=how.affine)
    for tensor in (x, torch.zeros(4, 6)):
        q = quantize_unchecked(tensor, how, storage)
        assert bool((q.scale > 0).all())
        y = q.dequantize()
        assert bool(y.isfinite().all())
        assert bool((y[tensor == 0] == 0).all())
        assert torch.allclose(y, tensor, rtol=0.02)


@given(st.floats(1e-11, 1e36), st.sampled_from(["E4M3FN", "INT8", "E5M2", "E2M5", "INT4"]))
def test_powers_of_two(value, name):
    x = torch.tensor([value, -value / 3])
    q = ov.quantize(x, Cast(name, scale=Current(power_of_two=True)))
    plain = ov.quantize(x, Cast(name)).scale.item()
    scale = q.scale.item()
    assert math.frexp(scale)[0] == 0.5
    assert plain <= scale < 2 * plain


def test_powers_of_two_that_already_are():
    for exponent in range(-30, 60):
        x = torch.tensor([448.0 * 2.0**exponent])
        assert ov.quantize(x, Cast("E4M3FN", scale=Current(power_of_two=True))).scale.item() == 2.0**exponent


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "how",
    [
        *[Cast(f) for f in EIGHT_BIT],
        Cast("UINT8"),
        Cast("INT8", affine=True),
        Cast("UINT8", affine=True),
        Cast("INT4", affine=True),
        Cast("E4M3FN", scale=Constant(1.0)),
        Cast("INT8", scale=Constant(1.0)),
        Cast("UINT8", scale=Constant(1.0), affine=True),
        Cast("E4M3FN", scale=Current(power_of_two=True)),
        Cast("INT8", scale=Current(power_of_two=True)),
        Cast(formats.float_format(2, 1, 10, "none")),
        Cast(formats.float_format(3, 2, 40, "none")),
        Cast(formats.float_format(3, 2, 4.3, "none")),
        Cast("E4M3FN", rounding="stochastic"),
    ],
    ids=str,
)
def test_what_is_not_a_number_poisons_its_block_and_no_other(how, bad):
    x = torch.rand(4, 9) + 0.5
    x[1, 4] = bad
    for granularity in (PerGroup(3), PerToken(), PerBlock(2, 3), PerTensor()):
        cast = Cast(how.format, granularity, how.scale, how.rounding, how.affine)
        with pytest.raises(OctavoError, match=r"\[4, 9\] holds 1 NaN or Inf"):
            ov.quantize(x, cast)
        q = quantize_unchecked(x, cast)
        y = q.dequantize()
        poisoned = torch.zeros(4, 9, dtype=torch.bool)
        for elements in blocks_of((4, 9), q.block).values():
            if (1, 4) in elements:
                for e in elements:
                    poisoned[e] = True
        assert torch.equal(y.isnan(), poisoned), y
        assert bool(y[~poisoned].isfinite().all())
        clean = quantize_unchecked(x.where(poisoned.logical_not(), 1.0), cast)
        if how.rounding != "stochastic":
            assert torch.equal(y[~poisoned], clean.dequantize()[~poisoned])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(
    "scale", [Current(), Current(power_of_two=True), Constant(0.0123)], ids=["current", "power of two", "constant"]
)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_scales_survive_their_storage(storage, granularity, scale, size, generator):
    """The scale is what a loader reads back from that dtype, and the codes were made with it."""
    x = torch.randn(8, 12, generator=generator) * size
    for name in ("INT8", "E4M3FN"):
        how = Cast(name, granularity, scale)
        q = quantize_unchecked(x, how, storage)
        assert torch.equal(q.scale.to(storage).float(), q.scale)
        assert bool((q.scale > 0).all())
        work = x / (q.scale.expand_as(x) if q.scale.shape == x.shape else naive_expand(q, x))
        numbers = ov.cast(work, name).clamp(-q.format.max, q.format.max)
        assert torch.equal(q.numbers(), numbers)


def naive_expand(q, x):
    spread = torch.empty_like(x)
    for index, elements in blocks_of(tuple(x.shape), q.block).items():
        for e in elements:
            spread[e] = q.scale[index]
    return spread


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3, 1e-4])
def test_small_weights_keep_their_precision_in_half_storage(size, generator):
    """float16 has subnormals; scales may use them rather than give up the codes' range."""
    x = torch.randn(64, 64, generator=generator) * size
    q = quantize_unchecked(x, Cast("INT8", PerChannel(0)), torch.float16)
    full = quantize_unchecked(x, Cast("INT8", PerChannel(0)), torch.float32)
    assert ov.sqnr(x, q.dequantize()) > ov.sqnr(x, full.dequantize()) - 1


@pytest.mark.parametrize("fmt", EIGHT_BIT, ids=str)
def test_the_ends_of_float32(fmt):
    top = torch.finfo(torch.float32).max
    for values in ([top, -top, 1.0], [top / 2, 0.0], [1e-38, -1e-38], [1e-45, 0.0]):
        for how in (Cast(fmt), Cast(fmt, affine=True) if isinstance(fmt, formats.IntegerFormat) else Cast(fmt)):
            q = ov.quantize(torch.tensor(values), how)
            assert bool(q.scale.isfinite().all())
            assert not q.dequantize(torch.float64).isnan().any()
            assert bool(q.dequantize(torch.float64).isfinite().all())


def test_float64_beyond_float32():
    x = torch.tensor([1e300, -1e300, 1.0, 1e-300], dtype=torch.float64)
    for name in ("INT8", "E4M3FN"):
        q = ov.quantize(x, Cast(name))
        assert bool(q.dequantize().isfinite().all())
    x = torch.randn(50, dtype=torch.float64)
    q = ov.quantize(x, Cast("INT8"))
    assert q.dequantize().dtype == torch.float64
    assert q.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fake_quantize_has_the_identity_for_a_gradient(dtype):
    x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    for how in (Cast("E4M3FN", PerToken()), Cast("INT8", affine=True), Cast("INT8", PerGroup(3))):
        y = ov.fake_quantize(x, how)
        assert y.dtype == dtype
        assert torch.equal(y, ov.quantize(x, how).dequantize())
        weight = torch.randn_like(y)
        (gradient,) = torch.autograd.grad((y * weight).sum(), x)
        assert torch.equal(gradient, weight)
    assert ov.fake_quantize(x, None) is x


def test_fake_quantize_reproduces_its_noise():
    x = torch.randn(100)
    how = Cast("E4M3FN", rounding="stochastic")

    def draw(verb):
        return verb(x, how, torch.Generator().manual_seed(5))

    assert torch.equal(draw(ov.fake_quantize), draw(ov.fake_quantize))
    assert torch.equal(draw(ov.fake_quantize), draw(ov.quantize).dequantize())
    torch.manual_seed(1)
    assert not torch.equal(draw(ov.fake_quantize), ov.fake_quantize(x, how))


@pytest.mark.parametrize("name", ["INT8", "E4M3FN"])
def test_stochastic_rounding_under_a_scale_is_unbiased(name):
    x = torch.full((500_000,), 0.7371)
    x[0] = 1.0
    y = ov.quantize(x, Cast(name, rounding="stochastic"), torch.Generator().manual_seed(2)).dequantize()
    levels = y[1:].unique()
    assert len(levels) == 2
    spacing = (levels[1] - levels[0]).item()
    assert abs(y[1:].double().mean().item() - x[1].item()) < 5 * spacing * 0.5 / math.sqrt(len(x))


@pytest.mark.parametrize("how", [Cast("INT8", PerGroup(4)), Cast("UINT8", PerChannel(1), affine=True)], ids=str)
def test_transposing_a_record(how):
    for shape in ((6, 8), (2, 5, 7)):
        if len(shape) == 3 and isinstance(how.granularity, PerChannel):
            how = Cast(how.format, PerChannel(-1), affine=True)
        q = ov.quantize(torch.randn(shape), how)
        assert q.mT.shape == q.codes.mT.shape
        assert torch.equal(q.mT.dequantize(), q.dequantize().mT)
        assert torch.equal(q.mT.mT.codes, q.codes)
        assert q.mT.codes.data_ptr() == q.codes.data_ptr()
        assert q.mT.block == (*q.block[:-2], q.block[-1], q.block[-2])


def test_the_record():
    q = ov.quantize(torch.randn(4, 6).bfloat16(), Cast("UINT8", PerToken(), affine=True))
    assert q.shape == (4, 6)
    assert q.device == torch.device("cpu")
    assert q.nbytes == 24 + 4 * 4 + 4 * 4
    assert q.dequantize().dtype == torch.bfloat16
    assert q.dequantize(torch.float64).dtype == torch.float64
    with pytest.raises(AttributeError):
        q.codes = None


def test_dequantize_is_rounded_once():
    x = torch.randn(64, 64).bfloat16()
    q = ov.quantize(x, Cast("INT8", PerChannel(0)))
    exact = q.codes.double() * q.scale.double()
    assert torch.equal(q.dequantize(torch.float64), exact)
    assert torch.equal(q.dequantize(torch.float32), exact.float())
    assert torch.equal(q.dequantize(), exact.float().bfloat16())


@pytest.mark.parametrize(
    ("how", "floor"),
    [
        (Cast("E4M3FN"), 25),
        (Cast("E5M2"), 19),
        (Cast("E3M4"), 31),
        (Cast("E2M5"), 37),
        (Cast("INT8"), 35),
        (Cast("INT8", affine=True), 35),
        (Cast("INT8", PerGroup(64)), 42),
        (Cast("E4M3FN", PerGroup(128), Current(power_of_two=True)), 25),
        (Cast("INT4", PerGroup(32)), 17),
        (Cast("INT16"), 80),
    ],
    ids=str,
)
def test_sqnr_of_a_gaussian(how, floor, generator):
    x = torch.randn(512, 512, generator=generator)
    assert floor < ov.sqnr(x, ov.fake_quantize(x, how)) < floor + 12


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert ov.sqnr(x, x) == math.inf
    assert ov.sqnr(x, x - torch.tensor([0.5, 0.0])) == pytest.approx(20.0)  # 25 / 0.25
    assert ov.sqnr(torch.ones(4), torch.zeros(4)) == pytest.approx(0.0)
    assert ov.sqnr(x.bfloat16(), x.half()) == math.inf
    assert math.isnan(ov.sqnr(x, torch.tensor([math.nan, 0.0])))
    with pytest.raises(OctavoError, match=r"\[2\].*\[1, 2\]"):
        ov.sqnr(x, x[None])


def test_impossible_casts():
    with pytest.raises(OctavoError, match="E4M3FN is a float"):
        Cast("E4M3FN", affine=True)
    with pytest.raises(OctavoError, match="rounding is one of"):
        Cast("INT8", rounding="closest")
    with pytest.raises(OctavoError, match="no format"):
        Cast("INT9x")
    with pytest.raises(OctavoError, match="cannot hold a tensor of signed numbers"):
        Cast(formats.float_format(4, 4, specials="none", signed=False))
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(OctavoError, match="positive and finite"):
            Constant(value)
    with pytest.raises(OctavoError, match="PerChannel"):
        ov.quantize(torch.ones(3), Cast("INT8", PerChannel(1)))


def test_casts_are_values():
    assert Cast("int8") == Cast(formats.INT8) == Cast(torch.int8)
    assert hash(Cast("int8", PerGroup(4))) == hash(Cast(formats.INT8, PerGroup(4)))
    assert Cast("int8", PerGroup(4)) != Cast("int8", PerGroup(5))
    assert Cast("int8").format is formats.INT8
