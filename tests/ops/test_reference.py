"""The law itself against exact rationals, on the raw operators; and the faster kernels against the law."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import ops
from octavo.core import formats
from octavo.core.formats import FloatFormat
from octavo.ops import OVERFLOWS, ROUNDINGS, cpu, reference
from tests.core.oracle import DIRECTED, probes, slow

SIGNED = [f for f in formats.CATALOGUE if isinstance(f, FloatFormat) and f.signed and f.bits <= 16]


def same(actual, expected):
    """Bit for bit, any NaN equal to any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~actual.isnan()
    assert torch.equal(actual[number], expected[number])
    assert torch.equal(actual[number].signbit(), expected[number].signbit())


def grid_of(fmt):
    return (fmt.grid.mantissa, fmt.grid.emin, fmt.grid.low, fmt.grid.high)


@pytest.mark.parametrize("rounding", DIRECTED)
@pytest.mark.parametrize("fmt", SIGNED, ids=str)
def test_the_law_is_exact(fmt, rounding):
    law = slow(fmt)
    x = probes(law, 1000, seed=11)
    flags = (not fmt.subnormals, fmt.has_negative_zero)
    tensor = torch.from_numpy(x)
    same(
        reference.cast(tensor, *grid_of(fmt), rounding, "saturate", *flags),
        torch.from_numpy(law.round_array(x, rounding, True)),
    )
    if fmt.has_infinity or fmt.has_nan:
        beyond = "inf" if fmt.has_infinity else "nan"
        same(
            reference.cast(tensor, *grid_of(fmt), rounding, beyond, *flags),
            torch.from_numpy(law.round_array(x, rounding, False)),
        )


def test_pow2_is_exact():
    exponents = torch.arange(-1022, 1023)
    assert reference.pow2(exponents).tolist() == [math.ldexp(1.0, e) for e in exponents.tolist()]


def test_exponent_of_is_exact():
    x = torch.tensor([1.0, 0.9999999999999999, 2.0, 2.0**-149, 3.0, 0.0, 1e308, 2.0**-1000], dtype=torch.float64)
    assert reference.exponent_of(x, -200).tolist() == [0, -1, 1, -149, 1, -200, 1000, -200]


@st.composite
def grids(draw):
    mantissa = draw(st.integers(0, 8))
    emin = draw(st.integers(-100, 60))
    high = math.ldexp(1 + draw(st.integers(0, 2**mantissa - 1)) / 2**mantissa, emin + draw(st.integers(0, 30)))
    return mantissa, emin, -high, high, draw(st.booleans()), draw(st.booleans())


def values_about(grid, seed, dtype):
    rng = np.random.default_rng(seed)
    mantissa, emin = grid[:2]
    steps = rng.integers(0, 2 ** (mantissa + 3), 150) / 2
    ties = steps * 2.0 ** (emin - mantissa) * 2.0 ** rng.integers(0, 12, 150)
    spread = rng.uniform(1, 2, 150) * 2.0 ** rng.integers(emin - mantissa - 3, emin + 35, 150)
    x = np.concatenate([ties, spread, [0.0, grid[3], grid[3] * 1.01, math.inf, math.nan]])
    return torch.from_numpy(np.concatenate([x, -x])).to(dtype)


@given(grids(), st.sampled_from(ROUNDINGS), st.sampled_from(OVERFLOWS), st.integers(0, 9999))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cast_of_the_cpu_equals_the_law(dtype, grid, rounding, overflow, seed):
    mantissa, emin, low, high, flush, negative_zero = grid
    x = values_about(grid, seed, dtype)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
    arguments = (mantissa, emin, low, high, rounding, overflow, flush, negative_zero, noise)
    same(ops.cast(x, *arguments), reference.cast(x, *arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_cast_in_chunks_equals_the_law(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 1000)
    monkeypatch.setattr(cpu.native, "cast", lambda *_: None)
    x = torch.randn(7, 13, 31).to(dtype) * 100
    noise = torch.rand(x.shape)
    for rounding in ROUNDINGS:
        arguments = (3, -6, -448.0, 448.0, rounding, "nan", False, True, noise)
        same(ops.cast(x, *arguments), reference.cast(x, *arguments))
        same(ops.cast(x.mT, *arguments[:-1], noise.mT), reference.cast(x, *arguments).mT.contiguous())


@given(
    st.integers(1, 7),
    st.integers(0, 6),
    st.integers(2, 100),
    st.sampled_from(["ieee", "fn", "fnuz", "none"]),
    st.integers(0, 999),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_encode_of_the_cpu_equals_the_law(dtype, exponent, mantissa, bias, specials, seed):
    if exponent == 1 and mantissa == 0 and specials != "none":
        return
    fmt = FloatFormat("mine", exponent, mantissa, bias, specials)
    values = fmt.table[torch.randint(len(fmt.table), (300,), generator=torch.Generator().manual_seed(seed))]
    special = torch.tensor([math.nan, -math.nan, 0.0, -0.0, *[math.inf, -math.inf] * fmt.has_infinity])
    x = torch.cat([values, special.double()]).to(dtype)
    if dtype != torch.float64:
        x = x[x.isnan() | (x.double() == torch.cat([values, special.double()]))]  # what the dtype holds
    x = x[(x.abs() <= fmt.max) | ~x.isfinite()]
    if dtype == torch.float16:  # torch loses a NaN's sign on the way from float16, in some lanes of a vector only
        x = x[~(x.isnan() & x.double().signbit())]
    arguments = (mantissa, fmt.emin, 1, fmt.bits, True, fmt.infinity_code, fmt.nan_code)
    codes = ops.encode(x, *arguments)
    same(codes, reference.encode(x, *arguments))
    assert int(codes.max()) < 2**fmt.bits  # NaN and infinity without a code must not become one that is none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_decode(dtype):
    table = formats.E4M3FN.table.to(dtype)
    codes = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    same(ops.decode(codes, table), table[codes.long()])
    same(ops.decode(codes.mT, table), table[codes.mT.long()])
    assert ops.decode(torch.empty(0, 3, dtype=torch.uint8), table).shape == (0, 3)
    assert ops.decode(torch.tensor(56, dtype=torch.uint8), table) == 1.0


SIZES = [(1, 1, 1), (3, 5, 1), (1, 7, 17), (4, 1, 17), (5, 6, 100), (33, 17, 129), (16, 16, 64), (2, 3, 5000)]


def operands(m, n, k, dtype):
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((m, k), (n, k)))
    else:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return a, b


def views(a, b):
    """The same numbers laid out in other ways."""
    yield a, b
    yield a.T.contiguous().T, b
    yield a, b.T.contiguous().T
    (m, k), n = a.shape, b.shape[0]
    wide = torch.zeros(m, k + 9, dtype=a.dtype)
    wide[:, 4 : 4 + k] = a
    tall = torch.zeros(2 * n, k + 3, dtype=b.dtype)
    tall[::2, :k] = b
    yield wide[:, 4 : 4 + k], tall[::2, :k]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int_mm_is_exact(size):
    a, b = operands(*size, torch.int8)
    expected = a.long() @ b.long().T
    for x, y in views(a, b):
        c = ops.int_mm(x, y)
        assert c.dtype == torch.int32
        assert torch.equal(c.long(), expected)
        assert torch.equal(reference.int_mm(x, y).long(), expected)


def test_int_mm_at_its_limit():
    k = 131071
    a = torch.full((1, k), -128, dtype=torch.int8)
    assert ops.int_mm(a, a).item() == k * 128**2 == reference.int_mm(a, a).item()


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (3, 5, 0), (0, 0, 0)], ids=str)
def test_products_of_nothing(shape):
    m, n, k = shape
    assert torch.equal(ops.int_mm(*operands(m, n, k, torch.int8)), torch.zeros(m, n, dtype=torch.int32))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(ops.float_mm(*operands(m, n, k, dtype)), torch.zeros(m, n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float_mm_is_within_its_bound(size, dtype):
    a, b = operands(*size, dtype)
    exact = a.double() @ b.double().T
    bound = size[2] * 2.0**-24 * (a.double().abs() @ b.double().abs().T)
    for x, y in views(a, b):
        for c in (ops.float_mm(x, y), reference.float_mm(x, y)):
            assert c.dtype == torch.float32
            assert bool(((c.double() - exact).abs() <= bound).all())


def test_float_mm_of_small_integers_is_exact():
    a, b = (t.bfloat16() for t in operands(9, 11, 300, torch.int8))
    assert torch.equal(ops.float_mm(a, b).long(), a.long() @ b.long().T)


@pytest.mark.parametrize("fmt", [formats.E4M3FN, formats.E5M2, formats.E3M4, formats.E2M5], ids=str)
def test_float_mm_takes_every_value_of_a_format(fmt):
    """Also the smallest: a kernel that takes subnormals of bfloat16 for zero must not meet any."""
    values = fmt.values().bfloat16()
    a, b = values[:, None], values[:, None]
    exact = values.double()[:, None] * values.double()
    assert torch.equal(ops.float_mm(a, b).double(), exact)


def test_unknown_words():
    x = torch.ones(2)
    with pytest.raises(ValueError, match="rounding"):
        reference.cast(x, 3, -6, -448.0, 448.0, "sideways", "saturate", False, True)
    with pytest.raises(ValueError, match="noise"):
        reference.cast(x, 3, -6, -448.0, 448.0, "stochastic", "saturate", False, True)
