"""Integer-only requantization against exact Python integers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo as ov
from octavo.core import formats
from octavo.core.requantize import (
    fixed_point,
    integer_matmul,
    multiply_fixed_point,
    requantize,
    rounding_divide_by_power_of_two,
    rounding_doubling_high_mul,
)
from octavo.errors import OctavoError

LOW, HIGH = -(2**31), 2**31 - 1
int32 = st.one_of(st.integers(LOW, HIGH), st.sampled_from([LOW, LOW + 1, -1, 0, 1, HIGH - 1, HIGH, 2**30, -(2**30)]))


def truncated(x, y):
    """C's division."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def high_mul(x, y):
    """gemmlowp fixedpoint.h, SaturatingRoundingDoublingHighMul, in exact integers."""
    if x == y == LOW:
        return HIGH
    product = x * y
    return truncated(product + (2**30 if product >= 0 else 1 - 2**30), 2**31)


def divide(x, exponent):
    """gemmlowp fixedpoint.h, RoundingDivideByPOT, from its meaning: nearest, ties away from zero."""
    whole, rest = divmod(abs(x), 2**exponent)
    return (whole + (2 * rest >= 2**exponent)) * (-1 if x < 0 else 1)


def apply(x, multiplier, shift):
    raised = min(max(x * 2 ** max(shift, 0), LOW), HIGH)
    return divide(high_mul(raised, multiplier), max(-shift, 0))


def t(*values):
    return torch.tensor(values, dtype=torch.int32)


@given(int32, int32)
def test_high_mul(x, y):
    assert rounding_doubling_high_mul(t(x), t(y)).item() == high_mul(x, y)


@given(int32, st.integers(0, 31))
def test_divide(x, exponent):
    assert rounding_divide_by_power_of_two(t(x), exponent).item() == divide(x, exponent)


def test_ties():
    assert rounding_divide_by_power_of_two(t(-3, -2, -1, 1, 2, 3), 1).tolist() == [-2, -1, -1, 1, 1, 2]
    assert rounding_doubling_high_mul(t(-3, -1, 1, 3), t(2**30)).tolist() == [-1, 0, 1, 2]  # upward
    assert rounding_doubling_high_mul(t(LOW), t(LOW)).item() == HIGH


@given(int32, st.integers(2**30, HIGH), st.integers(-31, 30))
def test_multiply(x, multiplier, shift):
    assert multiply_fixed_point(t(x), t(multiplier), t(shift)).item() == apply(x, multiplier, shift)


@given(st.floats(2.0**-32, 2.0**30, exclude_max=True))
def test_fixed_point(real):
    multiplier, shift = (int(x) for x in fixed_point(real))
    assert 2**30 <= multiplier <= HIGH
    assert abs(math.ldexp(multiplier, shift - 31) - real) <= real * 2.0**-31


def test_fixed_point_at_the_edges():
    assert [int(x) for x in fixed_point(0.5)] == [2**30, 0]
    assert [int(x) for x in fixed_point(1.0)] == [2**30, 1]
    assert [int(x) for x in fixed_point(1 - 2.0**-40)] == [2**30, 1]  # rounds up to 2**31, which is halved
    assert [int(x) for x in fixed_point((2**30 + 0.5) / 2**31)] == [2**30 + 1, 0]  # half away from zero
    assert [int(x) for x in fixed_point(0.0)] == [0, 0]
    assert [int(x) for x in fixed_point(2.0**-33)] == [0, 0]
    assert [int(x) for x in fixed_point(2.0**-32)] == [2**30, -31]
    for bad in (-0.1, math.nan, math.inf, 2.0**30):
        with pytest.raises(OctavoError, match="multipliers"):
            fixed_point(torch.tensor([0.5, bad], dtype=torch.float64))


@pytest.mark.parametrize("fmt", [formats.INT8, formats.UINT8, formats.INT16, formats.INT4])
def test_requantize(fmt, generator):
    """Per tensor and per channel, with zero points, against Python; small, large and extreme sums and multipliers."""
    total = torch.randint(LOW, HIGH, (40, 7), generator=generator)
    total >>= torch.randint(0, 31, (40, 7), generator=generator)
    total[0], total[1] = LOW, HIGH
    reals = torch.exp2(torch.tensor([-31.5, -20, -9.3, -1, 0, 2.6, 29], dtype=torch.float64))
    multiplier, shift = fixed_point(reals)
    zero = torch.tensor([0, 1, -5, fmt.low, fmt.high, 3, 0])
    codes = requantize(total.int(), multiplier, shift, zero, fmt)
    assert codes.dtype == fmt.code_dtype
    for i in range(40):
        for j in range(7):
            exact = apply(int(total[i, j]), int(multiplier[j]), int(shift[j])) + int(zero[j])
            assert int(codes[i, j]) == min(max(exact, fmt.low), fmt.high)
    one = requantize(total.int(), *fixed_point(2.0**-10 / 3), 2, fmt)
    m, s = (int(x) for x in fixed_point(2.0**-10 / 3))
    assert int(one[5, 3]) == min(max(apply(int(total[5, 3]), m, s) + 2, fmt.low), fmt.high)
    assert requantize(total[:0].int(), multiplier, shift).shape == (0, 7)


def test_requantize_refuses_what_is_no_int32():
    multiplier, shift = fixed_point(0.01)
    with pytest.raises(OctavoError, match="int32"):
        requantize(torch.ones(3), multiplier, shift)
    with pytest.raises(OctavoError, match="32 bits"):
        requantize(torch.tensor([2**31]), multiplier, shift)


@pytest.mark.parametrize(("left", "right"), [("INT8", "INT8"), ("UINT8", "INT8"), ("UINT8", "UINT8")])
def test_integer_matmul(left, right, generator):
    """Codes to codes: the exact product of the codes, zero points and all, by Python; close to the float product."""
    a = torch.rand(5, 60, generator=generator) * 3 - 1
    b = torch.randn(6, 60, generator=generator)
    x = ov.quantize(a, ov.Cast(left, ov.PerTensor(), affine=left == "UINT8"))
    w = ov.quantize(b, ov.Cast(right, ov.PerChannel(0), affine=right == "UINT8"))
    real = x.dequantize() @ w.dequantize().T
    scale, zero = float((real.max() - real.min()) / 255), -3
    bias = torch.arange(-300, 300, 100, dtype=torch.int32)
    y = integer_matmul(x, w, scale, zero, bias=bias)

    zx = 0 if x.zero_point is None else int(x.zero_point)
    for n in range(6):
        zw = 0 if w.zero_point is None else int(w.zero_point[n])
        worth = float(x.scale.double()) * float(w.scale[n].double()) / scale
        multiplier, shift = (int(v) for v in fixed_point(worth))
        for m in range(5):
            pairs = zip(x.codes[m].tolist(), w.codes[n].tolist(), strict=True)
            total = sum((p - zx) * (q - zw) for p, q in pairs) + int(bias[n])
            assert int(y.codes[m, n]) == min(max(apply(total, multiplier, shift) + zero, -128), 127)
    worth = x.scale * w.scale.T
    inside = (y.codes > -128) & (y.codes < 127)
    assert ((y.dequantize() - (real + bias * worth)).abs()[inside] <= 0.51 * scale).all()


def test_integer_matmul_refuses(generator):
    a = torch.randn(4, 32, generator=generator)
    whole, groups = ov.quantize(a, ov.Cast("INT8")), ov.quantize(a, ov.Cast("INT8", ov.PerGroup(16)))
    with pytest.raises(OctavoError, match="along K"):
        integer_matmul(whole, groups, 0.1)
    with pytest.raises(OctavoError, match="E4M3FN"):
        integer_matmul(whole, ov.quantize(a, ov.Cast("E4M3FN")), 0.1)
    with pytest.raises(OctavoError, match="M, K"):
        integer_matmul(whole, ov.quantize(a[:, :5], ov.Cast("INT8")), 0.1)
    long = ov.quantize(torch.ones(1, 140_000), ov.Cast("INT8"))
    with pytest.raises(OctavoError, match="32 bits"):
        integer_matmul(long, long, 1.0)


def test_zero_k():
    q = ov.quantize(torch.ones(2, 0), ov.Cast("INT8"))
    assert integer_matmul(q, q, 1.0, 5).codes.tolist() == [[5, 5], [5, 5]]


def test_requantize_refuses_what_registers_cannot_do():
    """A shift of 64 once came back as another number."""
    total, multiplier, shift = t(100), t(2**30), t(0)
    for bad in (-100, -32, 31, 64):
        with pytest.raises(OctavoError, match="shifts lie between -31 and 30"):
            requantize(total, multiplier, t(bad))
    for arguments, says in (
        ((torch.tensor([2**40]), shift), "32 bits"),
        ((multiplier, shift, 2.5), "zero points are integers"),
        ((multiplier, shift.float()), "shifts are integers"),
        ((multiplier, shift, 0, "E4M3FN"), "integer format"),
    ):
        with pytest.raises(OctavoError, match=says):
            requantize(total, *arguments)
    assert requantize(total, 2**30, 0, 1, "UINT8").tolist() == [51]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scale": torch.ones(4)}, "one scale"),
        ({"scale": 0.0}, "multipliers"),
        ({"zero_point": torch.tensor([1, 2])}, "one zero point"),
        ({"zero_point": 1.5}, "zero points are integers"),
        ({"fmt": "FP16"}, "integer format"),
        ({"bias": torch.ones(4)}, r"int32 \[4\]"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, r"int32 \[4\]"),
        ({"bias": torch.ones(4, 1, dtype=torch.int32)}, r"int32 \[4\]"),
        ({"a": torch.ones(4, 32)}, "QTensors"),
    ],
)
def test_integer_matmul_refuses_by_name(wrong, says):
    q = ov.quantize(torch.ones(4, 32), ov.Cast("INT8"))
    with pytest.raises(OctavoError, match=says):
        integer_matmul(**{"a": q, "b": q, "scale": 0.1, **wrong})
