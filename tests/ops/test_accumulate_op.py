"""Sums that round: the law against exact rationals, and the kernels against the law, bit for bit."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import ops
from octavo.ops import accumulate, build, cpu, native, reference
from octavo.ops.schema import ROUNDINGS, SumGrid

needs_library = pytest.mark.skipif(build.library("accumulate") is None, reason=build.status("accumulate"))
BEST = min(native._instruction_set(), 2)

GRIDS = {
    "1-6-9": SumGrid(9, -30, 2.0**32 * (2 - 2.0**-9), True, False),
    "FP16": SumGrid(10, -14, 65504.0, False, True),
    "BF16": SumGrid(7, -126, 2.0**127 * (2 - 2.0**-7), False, True),
    "float32": SumGrid(23, -126, 2.0**127 * (2 - 2.0**-23), False, True),
    "E4M3FN": SumGrid(3, -6, 448.0, False, False),
    "E5M2": SumGrid(2, -14, 57344.0, False, True),
}
SINGLE = GRIDS["float32"]


def operand(kind, rows, k, generator):
    x = torch.randn(rows, k, generator=generator)
    if kind == "E5M2":
        return x.to(torch.float8_e5m2).float()
    if kind == "E5M2 at its limits":
        return (x * 20000).clamp(-57344, 57344).to(torch.float8_e5m2).float()
    if kind == "E4M3":
        return (x * 100).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    if kind == "BF16":
        return x.bfloat16().float()
    if kind == "span of 2**120":
        return torch.ldexp(x, torch.randint(-60, 60, x.shape, generator=generator))
    if kind == "everything":
        return torch.ldexp(x, torch.randint(-140, 125, x.shape, generator=generator))
    if kind == "ties":
        return torch.ldexp(
            torch.randint(-3, 4, x.shape, generator=generator).float(),
            torch.randint(-12, 13, x.shape, generator=generator),
        )
    if kind == "special":
        dice = torch.rand(x.shape, generator=generator)
        x = x.to(torch.float8_e5m2).float().masked_fill(dice < 1e-3, math.inf)
        return x.masked_fill((dice > 0.01) & (dice < 0.011), -math.inf).masked_fill(dice > 0.9995, math.nan)
    return x


KINDS = ("E5M2", "E5M2 at its limits", "E4M3", "BF16", "float32", "span of 2**120", "everything", "ties", "special")


def same(actual, expected):
    """Bitwise equality, any NaN equal to any other."""
    assert actual is not None
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    wrong = (actual.view(torch.int32) != expected.view(torch.int32)) & ~(actual.isnan() & expected.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} differ: {actual[wrong][:5]} for {expected[wrong][:5]}"


def everywhere(kernel, *arguments):
    """What a kernel gives on each instruction set this machine can run."""
    for isa in range(BEST + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_instruction_set", lambda isa=isa: isa)
            yield kernel(*arguments)


# ---- the law against rationals ----


def exact_round(x, grid, rounding, noise=Fraction(0)):
    """A rational on the grid, by the definition; a float, which may be an infinity."""
    size, negative = abs(x), x < 0
    exponent = grid.emin
    if size >= Fraction(2) ** grid.emin:
        while size >= Fraction(2) ** (exponent + 1):
            exponent += 1
        spacing = Fraction(2) ** (exponent - grid.mantissa)
    else:
        spacing = Fraction(2) ** (grid.emin if grid.flush else grid.emin - grid.mantissa)
    steps, fraction = divmod(size / spacing, 1)
    outward = {
        "nearest-even": fraction > Fraction(1, 2) or (fraction == Fraction(1, 2) and steps % 2 == 1),
        "nearest-away": fraction >= Fraction(1, 2),
        "toward-zero": False,
        "up": fraction > 0 and not negative,
        "down": fraction > 0 and negative,
        "stochastic": fraction + noise >= 1,
    }[rounding]
    size = (steps + outward) * spacing
    if size > Fraction(grid.high):
        stops = rounding == "toward-zero" or rounding == ("up" if negative else "down")
        result = math.inf if grid.infinite and not stops else grid.high
        return -result if negative else result
    return float(-size if negative else size)


def mix(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def exact_noise(seed, m, n, number):
    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed + golden * (m + 1)) % 2**64) + golden * (n + 1)) % 2**64)
    return Fraction(mix((key + golden * (number + 1)) % 2**64) >> 40, 2**24)


def exact_sum(x, y, inner, rounding, chunk, outer, seed, m, n):
    def add(total, term, grid, number):
        if not (math.isfinite(total) and math.isfinite(term)):
            return total + term
        return exact_round(Fraction(total) + term, grid, rounding, exact_noise(seed, m, n, number))

    k, total = len(x), 0.0
    for turn, start in enumerate(range(0, k, chunk or k)):
        part = 0.0
        for i in range(start, min(k, start + (chunk or k))):
            part = add(part, Fraction(x[i]) * Fraction(y[i]), inner, i)
        total = add(total, Fraction(part) if math.isfinite(part) else part, outer, k + turn) if chunk else part
    return total + 0.0


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_law_is_exact(name, rounding, generator):
    for kind, chunk in (("E4M3", 0), ("float32", 5), ("everything", 0), ("ties", 0), ("span of 2**120", 7)):
        a, b = operand(kind, 2, 24, generator), operand(kind, 3, 24, generator)
        law = reference.accumulate_mm(a, b, *GRIDS[name], chunk, *SINGLE, rounding, 77)
        for m in range(2):
            for n in range(3):
                x, y = a[m].tolist(), b[n].tolist()
                exact = exact_sum(x, y, GRIDS[name], rounding, chunk, SINGLE, 77, m, n)
                assert float(law[m, n]) == exact or (math.isnan(law[m, n]) and math.isnan(exact))


def test_one_rounding_where_float64_would_round_twice():
    """1 + 2**-11 + 2**-80 lies just above a tie of FP16: float64 loses the last term and falls to the even side."""
    grid = GRIDS["FP16"]
    a, b = torch.tensor([[1.0, 2.0**-11 * (1 + 2.0**-23)]]), torch.tensor([[1.0, 1.0]])
    assert float(ops.accumulate_mm(a, b, grid)) == 1 + 2.0**-10
    wide = SumGrid(10, -120, 2.0**100, False, True)
    a, b = torch.tensor([[2.0**-80, 1 + 2.0**-11]]), torch.tensor([[1.0, 1.0]])
    assert float(torch.tensor(2.0**-80, dtype=torch.float64) + (1 + 2.0**-11)) == 1 + 2.0**-11  # the tie itself
    assert float(ops.accumulate_mm(a, b, wide)) == 1 + 2.0**-10
    assert float(ops.accumulate_mm(-a, b, wide)) == -1 - 2.0**-10
    assert float(ops.accumulate_mm(a * torch.tensor([-1.0, 1.0]), b, wide)) == 1.0


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_odd_sums(x, y):
    x, y = (math.ldexp(math.frexp(v)[0], math.frexp(v)[1] // 4) for v in (x, y))
    odd = float(reference.odd_sum(torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)))
    exact = Fraction(x) + Fraction(y)
    if Fraction(odd) != exact:
        assert int(torch.tensor(odd, dtype=torch.float64).view(torch.int64)) % 2 == 1
        low, high = sorted((Fraction(math.nextafter(odd, -math.inf)), Fraction(math.nextafter(odd, math.inf))))
        assert low < exact < high


# ---- the kernels against the law ----


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRIDS)
def test_kernels_equal_the_law(name, kind, generator):
    grid = GRIDS[name]
    a, b = operand(kind, 9, 70, generator), operand(kind, 35, 70, generator)
    cases = [(r, 0, grid) for r in ROUNDINGS] + [("nearest-even", 16, grid), ("nearest-even", 64, SINGLE)]
    for rounding, chunk, outer in [*cases, ("stochastic", 9, GRIDS["E4M3FN"]), ("up", 32, GRIDS["FP16"])]:
        law = reference.accumulate_mm(a, b, *grid, chunk, *outer, rounding, 123)
        for fast in everywhere(accumulate.rounded, a, b, grid, outer, chunk, rounding, 123):
            same(fast, law)


@needs_library
@pytest.mark.parametrize("precision", range(2, 12))
def test_the_narrow_kernel_at_its_conditions(precision, generator):
    """Products of exactly p bits into p bits, with every distance between them and the sum: float32 is just enough."""
    half = precision // 2
    bits = (half, precision - half)
    for flush, high in ((False, 2.0**60), (True, 2.0**12 * (2 - 2.0 ** (1 - precision)))):
        grid = SumGrid(precision - 1, -20, high, flush, False)

        def numbers(rows, p):
            odd = 2 * torch.randint(0, max(1, 2 ** (p - 1)), (rows, 400), generator=generator) + 1
            sign = 1 - 2 * torch.randint(0, 2, odd.shape, generator=generator)
            exponent = torch.randint(-14, 14, odd.shape, generator=generator)
            return torch.ldexp((odd * sign).float(), exponent)

        a, b = numbers(4, bits[0]), numbers(40, bits[1])
        found = [[bits[i], -14, 13 + bits[i], 0] for i in range(2)]
        assert accumulate._narrow(*found, grid, 400) < accumulate.GENERAL
        law = reference.accumulate_mm(a, b, *grid, 0, *grid, "nearest-even", 0)
        for fast in everywhere(accumulate.rounded, a, b, grid, grid, 0, "nearest-even", 0):
            same(fast, law)


@needs_library
def test_which_kernel():
    """Wide products, wide grids and numbers out of float32's reach are not for the float32 tile."""
    e5m2, e4m3, bf16 = [3, -16, 15, 0], [4, -9, 8, 0], [8, -9, 8, 0]
    ibm, half = GRIDS["1-6-9"], GRIDS["FP16"]
    assert accumulate._narrow(e5m2, e5m2, ibm, 64) == accumulate.NARROW + 1  # may overflow: saturates
    assert accumulate._narrow(e4m3, e4m3, ibm, 64) == accumulate.NARROW
    assert accumulate._narrow(e4m3, e4m3, half, 64) == accumulate.NARROW + 2
    assert accumulate._narrow(bf16, bf16, ibm, 64) == accumulate.GENERAL
    assert accumulate._narrow(e4m3, e4m3, SINGLE, 64) == accumulate.GENERAL
    assert accumulate._narrow([4, -9, 8, 1], e4m3, ibm, 64) == accumulate.GENERAL
    assert accumulate._narrow([3, -100, 15, 0], [3, -100, 15, 0], ibm, 64) == accumulate.GENERAL
    assert accumulate._narrow([3, 0, 100, 0], e5m2, GRIDS["BF16"], 64) == accumulate.GENERAL


@st.composite
def problems(draw):
    mantissa, emin = draw(st.integers(1, 23)), draw(st.integers(-126, 20))
    top = draw(st.integers(emin, 126))
    high = (2 - 2.0**-mantissa) * 2.0**top
    grid = SumGrid(mantissa, emin, high, draw(st.booleans()), draw(st.booleans()))
    m, n, k = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(0, 9))
    p = draw(st.integers(1, 24))
    centre, span = draw(st.integers(-30, 30)), draw(st.integers(0, 40))

    def matrix(rows):
        count = rows * k
        significands = st.integers(-(2**p) + 1, 2**p - 1)
        numbers = draw(st.lists(significands, min_size=count, max_size=count))
        exponents = draw(st.lists(st.integers(centre - span, centre + span), min_size=count, max_size=count))
        return torch.tensor([math.ldexp(x, e - p) for x, e in zip(numbers, exponents, strict=True)]).view(rows, k)

    return matrix(m), matrix(n), grid, draw(st.sampled_from(ROUNDINGS)), draw(st.integers(0, 4))


@needs_library
@settings(max_examples=150)
@given(problems())
def test_any_problem(problem):
    a, b, grid, rounding, chunk = problem
    law = reference.accumulate_mm(a, b, *grid, chunk, *grid, rounding, 5)
    for m in range(len(a)):
        for n in range(len(b)):
            if a.shape[1]:
                x, y = a[m].tolist(), b[n].tolist()
                exact = exact_sum(x, y, grid, rounding, chunk, grid, 5, m, n)
                assert float(law[m, n]) == exact or (math.isnan(law[m, n]) and math.isnan(exact))
    for fast in everywhere(accumulate.rounded, a, b, grid, grid, chunk, rounding, 5):
        same(fast, law)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (1, 1, 1), (33, 1, 7), (1, 70, 9), (65, 31, 2)])
def test_shapes(shape, generator):
    (m, n, k), grid = shape, GRIDS["1-6-9"]
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    for rounding in ("nearest-even", "stochastic"):
        law = reference.accumulate_mm(a, b, *grid, 3, *grid, rounding, 9)
        same(ops.accumulate_mm(a, b, grid, rounding, 3, seed=9), law)
        same(ops.accumulate_mm(a.T.contiguous().T, b, grid, rounding, 3, seed=9), law)
    x, y = (a * 9).round(), (b * 9).round()
    for saturate in (False, True):
        law = reference.accumulate_mm_integer(x, y, 7, saturate)
        assert torch.equal(ops.accumulate_mm_integer(x, y, 7, saturate), law)
    for promote in (0, 6):
        law = reference.accumulate_mm_aligned(a, b, 4, 14, promote)
        same(ops.accumulate_mm_aligned(a, b, 4, 14, promote), law)
    if k == 0:
        assert not ops.accumulate_mm(a, b, grid).any()
        assert not law.any()


def test_threads_and_modes_change_nothing(generator):
    a, b, grid = torch.randn(50, 300, generator=generator), torch.randn(90, 300, generator=generator), GRIDS["BF16"]
    threads, results = torch.get_num_threads(), []
    tiny = torch.full((40, 3), 2.0**-70), torch.full((40, 3), 2.0**-60)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for flush in (False, True):
                torch.set_flush_denormal(flush)
                for rounding in ("nearest-even", "stochastic"):
                    results.append(ops.accumulate_mm(a, b, grid, rounding, 64, seed=3))
                if build.library("accumulate") is not None:
                    bits = ops.accumulate_mm(*tiny, grid).view(torch.int32)
                    assert (bits == 3 << 19).all()  # a subnormal
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    for later in range(2, len(results)):
        same(results[later], results[later % 2])


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_aligned_equals_the_law(kind, generator):
    a, b = operand(kind, 9, 150, generator), operand(kind, 35, 150, generator)
    for align, bits, promote in ((32, 14, 0), (32, 14, 128), (5, 25, 33), (1, 3, 0), (100, 10, 64)):
        law = reference.accumulate_mm_aligned(a, b, align, bits, promote)
        for isa in range(BEST + 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "_instruction_set", lambda isa=isa: isa)
                same(cpu.accumulate_mm_aligned(a, b, align, bits, promote), law)


def test_aligned_against_rationals(generator):
    for kind in ("E4M3", "float32", "span of 2**120"):
        a, b = operand(kind, 2, 50, generator), operand(kind, 2, 50, generator)
        for align, bits, promote in ((8, 14, None), (8, 14, 20), (32, 6, 32)):
            found = ops.accumulate_mm_aligned(a, b, align, bits, promote or 0)
            for m in range(2):
                for n in range(2):
                    products = [Fraction(x) * Fraction(y) for x, y in zip(a[m].tolist(), b[n].tolist(), strict=True)]
                    total = torch.tensor(0.0)
                    for first in range(0, 50, promote or 50):
                        partial, stretch = Fraction(0), products[first : first + (promote or 50)]
                        for start in range(0, len(stretch), align):
                            terms = [partial, *stretch[start : start + align]]
                            peak, exponent = max(abs(t) for t in terms), -400
                            while peak >= Fraction(2) ** (exponent + 1):
                                exponent += 1
                            unit = Fraction(2) ** (exponent - bits + 1)
                            partial = sum(math.trunc(t / unit) for t in terms) * unit
                        total = total + torch.tensor(float(partial))
                    assert float(found[m, n]) == float(total)


@pytest.mark.parametrize("bits", [2, 8, 16, 24, 32])
@pytest.mark.parametrize("largest", [7, 127, 2000, 2**24])
def test_integers_against_python(bits, largest, generator):
    a = torch.randint(-largest, largest + 1, (3, 60), generator=generator).float()
    b = torch.randint(-largest, largest + 1, (36, 60), generator=generator).float()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for saturate in (False, True):
        expected = torch.zeros(3, 36, dtype=torch.int32)
        for m in range(3):
            for n in range(36):
                total = 0
                for x, y in zip(a[m].tolist(), b[n].tolist(), strict=True):
                    total += int(x) * int(y)
                    total = min(max(total, low), high) if saturate else (total - low) % 2**bits + low
                expected[m, n] = total
        assert torch.equal(reference.accumulate_mm_integer(a, b, bits, saturate), expected)
        for fast in everywhere(ops.accumulate_mm_integer, a, b, bits, saturate):
            assert torch.equal(fast, expected)


# ---- stochastic rounding ----


def test_noise_is_what_is_written():
    noise = reference.sum_noise(2**62 + 12345, 3, 4, torch.device("cpu"))
    for number in (0, 1, 1000):
        for m in range(3):
            for n in range(4):
                assert Fraction(float(noise(number)[m, n])) == exact_noise(2**62 + 12345, m, n, number)


def test_noise_is_uniform_and_independent():
    noise = reference.sum_noise(1, 100, 100, torch.device("cpu"))
    x = torch.stack([noise(i) for i in range(20)])
    assert abs(x.mean() - 0.5) < 4 * 12**-0.5 / x.numel() ** 0.5
    assert abs(x.var() - 1 / 12) < 1e-3
    for dim in range(3):
        first, second = x.narrow(dim, 0, x.shape[dim] - 1) - 0.5, x.narrow(dim, 1, x.shape[dim] - 1) - 0.5
        assert abs((first * second).mean()) < 4 / 12 / first.numel() ** 0.5


def test_stochastic_sums_are_unbiased():
    """1 + 64 · 0.3 steps of 1-6-9: nearest-even stays at 1; stochastic is right on average, with the spread it must."""
    step, rows = 2.0**-9, 20_000
    a = torch.tensor([[1.0] + [0.3 * step] * 64]).expand(rows, -1).contiguous()
    b = torch.ones(1, 65)
    assert (ops.accumulate_mm(a, b, GRIDS["1-6-9"]) == 1).all()
    steps = (ops.accumulate_mm(a, b, GRIDS["1-6-9"], "stochastic", seed=4) - 1) / step
    variance = 64 * 0.3 * 0.7
    assert abs(float(steps.mean()) - 64 * 0.3) < 4 * (variance / rows) ** 0.5
    assert float(steps.var()) == pytest.approx(variance, rel=0.05)
    other = ops.accumulate_mm(a, b, GRIDS["1-6-9"], "stochastic", seed=5)
    assert not torch.equal(other, 1 + steps * step)


# ---- specials, fallbacks, registration ----


@pytest.mark.parametrize("name", GRIDS)
def test_specials_propagate(name):
    inf, nan = math.inf, math.nan
    a = torch.tensor([[inf, 1.0], [1.0, -inf], [inf, inf], [inf, 0.0], [nan, 1.0], [0.0, inf]])
    b = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    expected = torch.tensor([[inf, inf], [-inf, inf], [inf, nan], [inf, inf], [nan, nan], [inf, -inf]])
    for law in (ops.accumulate_mm(a, b, GRIDS[name]), ops.accumulate_mm(a, b, GRIDS[name], "down", 1)):
        same(law, expected)
    same(ops.accumulate_mm_aligned(a, b, 32, 14, 128), expected)


def test_overflow():
    a, b = torch.tensor([[400.0, 400.0, -400.0]]), torch.ones(1, 3)
    assert float(ops.accumulate_mm(a, b, GRIDS["E4M3FN"])) == 48  # 448 − 400: it stopped at its largest
    big = a * 130
    assert float(ops.accumulate_mm(big, b, GRIDS["E5M2"])) == math.inf
    assert float(ops.accumulate_mm(big, b, GRIDS["E5M2"], "toward-zero")) == 5120  # 57344 − 52000, cut off
    assert float(ops.accumulate_mm(-big, b, GRIDS["E5M2"])) == -math.inf
    assert float(ops.accumulate_mm(-big, b, GRIDS["E5M2"], "up")) == -5120


def test_zero_has_no_sign():
    a, b = torch.tensor([[-1.0, 1.0], [-0.0, -0.0], [-(2.0**-40), 0.0]]), torch.ones(1, 2)
    for grid in GRIDS.values():
        for rounding in ROUNDINGS:
            result = ops.accumulate_mm(a, b, grid, rounding)
            assert not (result.signbit() & (result == 0)).any()


def test_without_kernels_the_law_serves(monkeypatch, generator):
    a, b, grid = torch.randn(3, 40, generator=generator), torch.randn(4, 40, generator=generator), GRIDS["FP16"]
    with_kernels = (
        ops.accumulate_mm(a, b, grid, "stochastic", 8, SINGLE, 6),
        ops.accumulate_mm_aligned(a, b, 32, 14, 0),
        ops.accumulate_mm_integer((9 * a).round(), (9 * b).round(), 8, True),
    )
    monkeypatch.setattr(build, "library", lambda name="native": None)
    assert accumulate.rounded(a, b, grid, grid, 0, "nearest-even", 0) is None
    same(ops.accumulate_mm(a, b, grid, "stochastic", 8, SINGLE, 6), with_kernels[0])
    same(ops.accumulate_mm_aligned(a, b, 32, 14, 0), with_kernels[1])
    assert torch.equal(ops.accumulate_mm_integer((9 * a).round(), (9 * b).round(), 8, True), with_kernels[2])


@needs_library
def test_what_the_kernels_leave_to_the_law():
    a, grid = torch.ones(2, 3), GRIDS["FP16"]
    assert accumulate.rounded(a.double(), a, grid, grid, 0, "nearest-even", 0) is None
    assert accumulate.rounded(a, a[:, :2], grid, grid, 0, "nearest-even", 0) is None
    powers = SumGrid(0, -6, 64.0, False, False)  # without a mantissa a tie's parity is the exponent's
    assert accumulate.rounded(a, a, powers, powers, 0, "nearest-even", 0) is None
    assert float(ops.accumulate_mm(torch.tensor([[1.0, 0.5]]), torch.ones(1, 2), powers)) in (1.0, 2.0)
    assert accumulate.aligned(a, a, 32, 50, 0) is None


@pytest.mark.parametrize(
    ("op", "extra"),
    [
        ("accumulate_mm", (*GRIDS["FP16"], 4, *SINGLE, "stochastic", 3)),
        ("accumulate_mm_aligned", (32, 14, 128)),
        ("accumulate_mm_integer", (16, True)),
        ("accumulate_mm_integer", (16, False)),
    ],
)
def test_registered_as_torch_wants_it(op, extra):
    a, b = torch.ones(3, 8), torch.ones(5, 8)
    torch.library.opcheck(getattr(torch.ops.octavo, op).default, (a, b, *extra))
