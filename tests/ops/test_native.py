"""The compiled kernels against the law, bit for bit, on every instruction set this machine can run."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core import formats
from octavo.ops import build, native, reference
from octavo.ops.grid import described
from octavo.ops.schema import OVERFLOWS, ROUNDINGS

needs_library = pytest.mark.skipif(build.library() is None, reason=build.status())
needs_bf16 = pytest.mark.skipif(
    build.library() is None or native._instruction_set() < 3, reason=f"no AVX512-BF16 here ({build.status()})"
)
BEST = native._instruction_set()

# mantissa, emin, low, high, flush, negative zero
GRIDS = {
    "E4M3FN": (3, -6, -448.0, 448.0, False, True),
    "E5M2": (2, -14, -57344.0, 57344.0, False, True),
    "E4M3FNUZ": (3, -7, -240.0, 240.0, False, False),
    "E2M5": (5, -1, -3.9375, 3.9375, False, True),
    "1-6-9": (9, -30, -(2.0**32) * (2 - 2.0**-9), 2.0**32 * (2 - 2.0**-9), True, True),
    "E8M0": (0, -127, 2.0**-127, 2.0**127, False, False),
    "E3M0": (0, -2, -16.0, 16.0, False, True),
    "INT8": (7, 7, -128.0, 127.0, False, False),
    "UINT8": (8, 8, 0.0, 255.0, False, False),
    "BF16": (7, -126, -(2.0**127) * (2 - 2.0**-7), 2.0**127 * (2 - 2.0**-7), False, True),
    "BF16 flush": (7, -126, -(2.0**127) * (2 - 2.0**-7), 2.0**127 * (2 - 2.0**-7), True, True),
    "FP16": (10, -14, -65504.0, 65504.0, False, True),
    "float32": (23, -126, -(2.0**127) * (2 - 2.0**-23), 2.0**127 * (2 - 2.0**-23), False, True),
    "limits between two BF16": (8, -4, -2 - 3 * 2.0**-7, 2 + 2.0**-7, False, True),  # a tie down, a tie up
    "without zero": (2, -3, 0.125, 28.0, False, True),
    "finest": (3, -146, -(2.0**-100), 2.0**-100, False, True),
    "all subnormal, huge": (4, 125, -(2.0**126), 2.0**126, False, True),
}


def same(actual, expected):
    """Bitwise equality, any NaN equal to any other."""
    assert actual is not None
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = torch.int32 if actual.dtype == torch.float32 else torch.int16
    wrong = (actual.view(integer) != expected.view(integer)) & ~(actual.isnan() & expected.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} differ: {actual[wrong][:5]} for {expected[wrong][:5]}"


def check(x, grid, rounding, overflow, noise=None):
    mantissa, emin, low, high, flush, negative_zero = grid
    arguments = (mantissa, emin, low, high, rounding, overflow, flush, negative_zero, noise)
    law = reference.cast(x, *arguments)
    for isa in range(min(BEST, 2) + 1):  # the fourth, AVX512-BF16, concerns the matmul alone
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_instruction_set", lambda isa=isa: isa)
            same(native.cast(x, *arguments), law)


@functools.cache
def inputs(mantissa, emin, low, high, flush):
    """Random patterns, plus the grid's own numbers, its ties, its limits and the neighbours of all of these."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 8_000, dtype=np.uint32).view(np.float32)
    near = (generator.standard_normal(8_000) * np.exp2(generator.integers(-8, 9, 8_000)) * 2.0**emin).clip(-3e38, 3e38)
    exponents = np.arange(max(emin - 2, -149 + mantissa), min(emin + 6, 127))
    steps = np.concatenate([np.arange(0, 18), 2.0**mantissa + np.arange(-5, 6)])
    numbers = (np.abs(steps)[:, None] * np.exp2(exponents - mantissa - 1.0)).ravel()  # half steps: numbers and ties
    limits = np.array([abs(low), high]) * np.array([[0.5], [1 - 2**-9], [1], [1 + 2.0 ** -(mantissa + 1)], [1.25], [2]])
    special = [0, np.inf, np.nan, 2.0**-149, 2.0**-126, 2.0**127 * (2 - 2.0**-23), 2.0**emin, 2.0 ** (emin - 1)]
    with np.errstate(over="ignore"):
        exact = np.concatenate([numbers, limits.ravel(), special]).astype(np.float32)
        exact = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    return torch.from_numpy(np.concatenate([patterns, near.clip(-3e38, 3e38).astype(np.float32), exact, -exact]))


@needs_library
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", GRIDS)
def test_cast_equals_the_law(name, rounding):
    x = inputs(*GRIDS[name][:5])
    # noise that decides: 1 - fraction itself, and one step to either side, among the uniform
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    noise[::5] = 1 - torch.randint(1, 2**12, noise[::5].shape) * 2.0**-12
    noise[1::5] = torch.tensor(1 - 2.0**-24)
    noise[2::35] = torch.tensor(2.0**-24) - 2.0**-48
    for overflow in OVERFLOWS:
        check(x, GRIDS[name], rounding, overflow, noise)
        check(x.bfloat16(), GRIDS[name], rounding, overflow, noise)


@needs_library
@pytest.mark.parametrize("name", ["E4M3FN", "E8M0", "1-6-9", "finest"])
def test_the_noise_that_just_decides(name):
    """Noise at exactly 1 - fraction, and at the float32 numbers beside it."""
    mantissa, emin, low, high, flush = GRIDS[name][:5]
    x = inputs(mantissa, emin, low, high, flush)
    x = x[x.abs() <= high]
    magnitude = x.abs().double()
    exponent = (torch.frexp(magnitude)[1] - 1).clamp(min=emin)
    spacing = torch.where((exponent == emin) & (magnitude < 2.0**emin) & flush, emin, exponent - mantissa)
    fraction = torch.ldexp(magnitude, -spacing).frac()
    needed = (1 - fraction).float()
    for noise in (needed, torch.nextafter(needed, torch.tensor(0.0)), torch.nextafter(needed, torch.tensor(1.0))):
        check(x, GRIDS[name], "stochastic", "saturate", noise.clamp(max=1 - 2.0**-24))


@st.composite
def grids(draw):
    mantissa = draw(st.integers(0, 23))
    emin = draw(st.integers(mantissa - 149, 100))
    flush = draw(st.booleans())
    top = draw(st.integers(emin, 126))

    def number():
        return (2.0**mantissa + draw(st.integers(0, 2**mantissa - 1))) * 2.0 ** (
            draw(st.integers(emin, top)) - mantissa
        )

    high = number()
    low = draw(st.sampled_from([-high, 0.0, -number(), min(number(), high)]))
    return mantissa, emin, low, high, flush, draw(st.booleans())


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    grid=grids(), rounding=st.sampled_from(ROUNDINGS), overflow=st.sampled_from(OVERFLOWS), seed=st.integers(0, 2**32)
)
def test_any_grid(grid, rounding, overflow, seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 2**32, 600, dtype=np.uint32)
    field = (grid[1] + 127 + generator.integers(-3, 4, 300)).clip(0, 254).astype(np.uint32)
    x[300:] = (x[300:] & 0x807FFFFF) | field << 23  # around the smallest normal number
    x[::3] &= 0xFFFFFFFF << int(generator.integers(0, 24)) & 0xFFFFFFFF  # few bits: ties
    x = torch.from_numpy(x.view(np.float32))
    noise = torch.from_numpy(generator.random(600, dtype=np.float32))
    check(x, grid, rounding, overflow, noise)
    check(x.bfloat16(), grid, rounding, overflow, noise)


@needs_library
def test_shapes():
    for shape in [(), (0,), (3, 0), (1,), (7, 11), (16384 * 3 + 5,), (2, 3, 16389)]:
        check(torch.randn(shape), GRIDS["E4M3FN"], "nearest-even", "saturate")
        check(torch.randn(shape).bfloat16(), GRIDS["E4M3FN"], "nearest-even", "saturate")


@needs_library
def test_subnormals_survive_a_process_that_flushes_them():
    grid = (23, -126, -1.0, 1.0, "nearest-even", "saturate", False, True, None)
    x = torch.tensor([1, 2, 0x7FFFFF, 0x80000001 - 2**32], dtype=torch.int32).view(torch.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    small = (3, -122, -(2.0**-110), 2.0**-110, "nearest-even", "saturate", False, True, None)
    near = torch.arange(-(2**17), 2**17, dtype=torch.int32).mul(2**10).abs().view(torch.float32)
    law = reference.cast(near, *small)
    try:
        described.cache_clear()
        y = native.cast(x, *grid)
        lowest = native.cast(near, *small)
        assert described(*small[:-1]).quick
        finest = native.cast(x, 0, -149, 2.0**-149, 2.0**-149, "nearest-even", "saturate", False, True, None)
    finally:
        torch.set_flush_denormal(False)
    same(y, x)
    same(lowest, law)
    assert finest.view(torch.int32).tolist() == [1, 1, 1, 1]


@needs_library
@pytest.mark.parametrize("name", GRIDS)
def test_every_float16(name):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for rounding in ("nearest-even", "up"):
        for overflow in OVERFLOWS:
            check(x, GRIDS[name], rounding, overflow)
    check(x, GRIDS[name], "stochastic", "saturate", torch.rand(2**16))


@needs_library
@pytest.mark.parametrize("fmt", list(formats.eight_bit()), ids=str)
def test_the_usual_rounding_takes_the_quick_way(fmt):
    """So that the tests against the law are tests of it; where it does not serve, see ``grid.even_grid``."""
    mantissa, emin, low, high = fmt.grid
    assert described(mantissa, emin, low, high, "nearest-even", "saturate", False, fmt.has_negative_zero).quick
    assert not described(mantissa, emin, low, high, "up", "saturate", False, fmt.has_negative_zero).quick


@needs_library
def test_a_cast_in_place():
    for dtype in native.OUTPUTS:
        x = torch.randn(16384 * 3 + 5).to(dtype)
        grid = (*GRIDS["E4M3FN"][:4], "nearest-even", "saturate", False, True, None)
        law = reference.cast(x, *grid)
        assert native.cast(x, *grid, in_place=True) is x
        same(x, law)


@needs_library
def test_nan_keeps_its_sign_and_becomes_quiet():
    x = torch.tensor([0x7F800001, 0xFF800001 - 2**32, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    y = native.cast(x, *GRIDS["E4M3FN"][:4], "nearest-even", "saturate", False, True, None)
    assert y.view(torch.int32).tolist() == [0x7FC00001, 0xFFC00001 - 2**32, 0x7FC12345]


@needs_library
def test_what_cast_leaves_to_torch():
    grid = (3, -6, -448.0, 448.0, "nearest-even", "saturate", False, True)
    x = torch.randn(4, 4)
    noisy = (*grid[:4], "stochastic", *grid[5:])
    assert native.cast(x.double(), *grid, None) is None
    assert native.cast(x.t(), *grid, None) is None
    assert native.cast(x.to("meta"), *grid, None) is None
    assert native.cast(torch._neg_view(x), *grid, None) is None
    assert native.cast(x.to_sparse(), *grid, None) is None
    assert native.cast(x, *noisy, None) is None
    assert native.cast(x, *noisy, torch.rand(4, 4).bfloat16()) is None
    assert native.cast(x, *noisy, torch.rand(4)) is None
    assert native.cast(x, 3, -147, *grid[2:], None) is None  # a quantum under 2**-149
    assert native.cast(x, 24, *grid[1:], None) is None
    assert native.cast(x, 3, -6, -448.0, 2.0**128, *grid[4:], None) is None
    assert native.cast(x, 3, -6, -448.0, 0.1, *grid[4:], None) is None  # not a float32 number
    assert native.cast(x, 3, -6, -448.0, float("inf"), *grid[4:], None) is None
    assert native.cast(x, 3, -6, -448.0, 1e300, *grid[4:], None) is None
    assert native.cast(x, *grid[:4], "sideways", *grid[5:], None) is None  # the law says what is wrong with it
    assert native.cast(x, *grid[:5], "wrap", *grid[6:], None) is None


SHAPES = [
    *[
        (m, n, k)
        for m in (1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 48, 63, 64, 65, 129)
        for n, k in ((1, 1), (13, 31), (50, 67))
    ],
    *[(70, n, 33) for n in (1, 2, 5, 6, 7, 11, 12, 13, 95, 96, 97, 200)],
    *[(20, 9, k) for k in (2, 3, 32, 64, 65, 2047, 2048, 2049, 4100)],
    *[(3, 5, 2049), (300, 301, 302), (128, 512, 640)],
]


@needs_bf16
def test_gemm_is_within_its_bound():
    torch.manual_seed(0)
    for m, n, k in SHAPES:
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        exact = a.double() @ b.double().t()
        bound = k * 2.0**-24 * (a.double().abs() @ b.double().abs().t())
        c = native.float_mm(a, b)
        assert c.shape == (m, n)
        assert c.dtype == torch.float32
        assert ((c.double() - exact).abs() <= bound).all(), (m, n, k)


@needs_bf16
@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (3, 5, 0), (20, 5, 0), (0, 0, 0)])
def test_gemm_of_nothing(shape):
    m, n, k = shape
    c = native.float_mm(torch.ones(m, k).bfloat16(), torch.ones(n, k).bfloat16())
    assert torch.equal(c, torch.zeros(m, n))


@needs_bf16
@pytest.mark.parametrize("m", [1, 5, 9, 40, 70])
def test_gemm_reads_rows_where_they_lie_and_nothing_else(m):
    """Strided rows, with NaN in every gap: an odd K makes the kernel look for half a pair beyond the end."""
    k, n = 37, 29
    a, b = torch.full((m, 50), torch.nan).bfloat16(), torch.full((n, 45), torch.nan).bfloat16()
    a[:, 3 : 3 + k], b[:, 1 : 1 + k] = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    a, b = a[:, 3 : 3 + k], b[:, 1 : 1 + k]
    assert torch.equal(native.float_mm(a, b), native.float_mm(a.contiguous(), b.contiguous()))
    row = torch.randn(1, k).bfloat16().expand(m, k)
    assert torch.equal(native.float_mm(row, b), native.float_mm(row.contiguous(), b))


@needs_bf16
@pytest.mark.parametrize("m", [1, 5, 70])
def test_gemm_carries_infinities_and_nans(m):
    a, b = torch.ones(m, 5).bfloat16(), torch.ones(9, 5).bfloat16()
    a[0, 4], b[3, 1], b[4, 4] = torch.inf, torch.nan, 0.0
    assert torch.equal(native.float_mm(a, b).nan_to_num(7), (a.float() @ b.float().t()).nan_to_num(7))


@needs_bf16
def test_gemm_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for m, n, k in [(1, 700, 333), (6, 1000, 500), (70, 500, 2500), (333, 444, 555)]:
            a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(native.float_mm(a, b))
            assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


@needs_bf16
def test_what_gemm_leaves_to_torch(monkeypatch):
    a = torch.randn(4, 6).bfloat16()
    assert native.float_mm(a, a.float()) is None
    assert native.float_mm(a.t(), a.t()) is None
    assert native.float_mm(a, a[:, :5]) is None
    assert native.float_mm(a[0], a) is None
    monkeypatch.setattr(native, "_instruction_set", lambda: 2)
    assert native.float_mm(a, a) is None


# ---- products of codes ----

PRODUCTS = [
    *[(m, n, k) for m in (1, 4, 5, 17, 50) for n, k in ((1, 1), (13, 31), (50, 67))],
    *[(20, 9, k) for k in (3, 64, 2049, 4097)],
    (130, 101, 302),
]


def operands(kind, m, n, k):
    """``a`` and ``b`` with their tables, and the numbers of both, exactly."""
    generator = torch.Generator().manual_seed(m + n + k)
    table = torch.randn(256, generator=generator).bfloat16()

    def codes(rows, dtype=torch.uint8):
        low = -128 if dtype == torch.int8 else 0
        return torch.randint(low, low + 256, (rows, k), dtype=dtype, generator=generator)

    if kind == "floats":
        a, b = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
        return (a, None, a.double()), (b, None, b.double())
    if kind in ("int8", "uint8"):
        a, b = codes(m, getattr(torch, kind)), codes(n, torch.int8)
        return (a, None, a.double()), (b, None, b.double())
    a, b = (codes(rows) for rows in (m, n))
    left = (a, table, table[a.int()].double())
    if kind == "float and codes":
        left = (left[2].bfloat16(), None, left[2])
    return left, (b, table, table[b.int()].double())


@needs_bf16
@pytest.mark.parametrize("dtype", native.OUTPUTS)
@pytest.mark.parametrize("kind", ["floats", "codes", "float and codes", "int8", "uint8"])
def test_scaled_products(kind, dtype):
    integers = kind in ("int8", "uint8")
    for m, n, k in PRODUCTS:
        (a, a_table, x), (b, b_table, w) = operands(kind, m, n, k)
        for stretch in (1, 7, 64, k):
            if k // stretch > 100:
                continue
            parts = -(-k // stretch)
            left, right, bias = torch.rand(m, parts) + 0.5, torch.rand(n, 1) + 0.5, torch.randn(n)
            zeros = None
            if integers:
                zeros = torch.randint(-128, 128, (m, parts), dtype=torch.int32) + 128 * (kind == "uint8")
            y = native.scaled_mm(a, b, left, right, stretch, a_table, b_table, zeros, bias, dtype)
            shifted = x if zeros is None else x - zeros.repeat_interleave(stretch, 1)[:, :k]
            expected = torch.zeros(m, n)
            for s, (p, q) in enumerate(zip(shifted.split(stretch, 1), w.split(stretch, 1), strict=True)):
                part = (p @ q.T).float() * left[:, s : s + 1] * right.T
                expected = part if s == 0 else expected + part
            expected = (expected + bias).to(dtype)
            assert y.dtype == dtype
            if integers:
                assert torch.equal(y, expected), (m, n, k, stretch)
            else:
                size = 4 * (x.abs() @ w.abs().T + bias.abs())
                bound = size * (k + 8) * 2.0**-24 + expected.double().abs() * torch.finfo(dtype).eps
                assert ((y.double() - expected.double()).abs() <= bound).all(), (m, n, k, stretch)


@needs_bf16
def test_scaled_products_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for kind, m, n, k in [("codes", 3, 700, 333), ("codes", 70, 50, 2500), ("int8", 333, 44, 555)]:
            (a, a_table, _), (b, b_table, _) = operands(kind, m, n, k)
            left, right = torch.rand(m, -(-k // 64)), torch.rand(n, 1)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(native.scaled_mm(a, b, left, right, 64, a_table, b_table, None, None, torch.bfloat16))
            assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


@needs_bf16
def test_what_scaled_products_leave_to_the_law():
    a, one = torch.ones(3, 8, dtype=torch.int8), torch.ones(1, 1)
    zeros, table = torch.full((1, 1), 200, dtype=torch.int32), torch.ones(256).bfloat16()
    rest = (None, None, None, None, torch.float32)
    assert native.scaled_mm(a, a, one, one, 8, *rest) is not None
    assert native.scaled_mm(a, a, one, one, 8, None, None, zeros, None, torch.float32) is None  # sums beyond 32 bits
    assert native.scaled_mm(a, a, one, one, 8, None, None, None, None, torch.float64) is None
    assert native.scaled_mm(a, a.view(torch.uint8), one, one, 8, *rest) is None
    assert native.scaled_mm(a, a.bfloat16(), one, one, 8, *rest) is None
    assert native.scaled_mm(a.view(torch.uint8), a.bfloat16(), one, one, 8, table[:64], *rest[1:]) is None
    assert native.scaled_mm(a, a, torch.ones(3, 2), one, 8, *rest) is None


@needs_library
@pytest.mark.parametrize("dtype", native.OUTPUTS)
@pytest.mark.parametrize("sums", [torch.int32, torch.float32])
def test_scaling_sums_equals_the_law(sums, dtype):
    for m, n in [(0, 3), (3, 0), (1, 1), (5, 67), (200, 301)]:
        x = torch.randint(-(2**31), 2**31 - 1, (m, n), dtype=torch.int32)
        if sums == torch.float32:  # any bits
            x = x.view(torch.float32)
        scales = [torch.randn(rows, 1).exp2() * 2.0 ** torch.randint(-30, 1, (rows, 1)) for rows in (m, n)]
        for left, right in (scales, (torch.full((1, 1), 1e-7), scales[1]), (scales[0], torch.full((1, 1), torch.nan))):
            for bias in (None, torch.randn(n), torch.randn(n).bfloat16()):
                law = reference.scale_sums(x, left, right, bias, dtype)
                for isa in range(min(BEST, 2) + 1):
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(native, "_instruction_set", lambda isa=isa: isa)
                        same(native.scale_sums(x, left, right, bias, dtype), law)


@needs_library
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (300, 301)])
def test_decode_looks_up_every_code(shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    table = torch.randn(256).bfloat16()
    assert torch.equal(native.decode(codes, table), table[codes.int()])


@needs_library
def test_decode_leaves_other_tables_to_the_law():
    codes = torch.zeros(4, dtype=torch.uint8)
    assert native.decode(codes, torch.zeros(64, dtype=torch.bfloat16)) is None  # a 6-bit format: codes could miss it
    assert native.decode(codes, torch.zeros(256)) is None
    assert native.decode(codes.int(), torch.zeros(256, dtype=torch.bfloat16)) is None
