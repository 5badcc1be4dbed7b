"""Independent laws to hold the package against, written from the definitions and sharing nothing with it.

``Slow`` builds a float format code by code in exact rationals. ``Slow.round`` rounds one rational by looking at its two
neighbours in that table. ``Slow.round_array`` is the same for float64 arrays, by binary search; ``test_oracle.py``
holds it against ``Slow.round`` and against gfloat.
"""

import functools
import math
from fractions import Fraction

import numpy as np
from gfloat import Domain, FormatInfo, RoundMode

MODES = {
    "nearest-even": RoundMode.TiesToEven,
    "nearest-away": RoundMode.TiesToAway,
    "toward-zero": RoundMode.TowardZero,
    "up": RoundMode.TowardPositive,
    "down": RoundMode.TowardNegative,
}
DIRECTED = tuple(MODES)


class Slow:
    """A float format with an integer bias, spelt out."""

    def __init__(self, exponent, mantissa, bias, specials, subnormals=True, signed=True, zero=True):
        self.exponent, self.mantissa, self.bias, self.specials = exponent, mantissa, bias, specials
        self.subnormals, self.signed, self.zero = subnormals, signed, zero
        self.codes = [self.value(code) for code in range(2 ** (signed + exponent + mantissa))]
        half = 2 ** (exponent + mantissa)
        positive = [(v, c) for c, v in enumerate(self.codes[:half]) if isinstance(v, Fraction)]
        self.magnitudes = [v for v, _ in positive]  # ascending by construction
        self.parity = [c % 2 for _, c in positive]
        assert self.magnitudes == sorted(set(self.magnitudes))
        top = self.magnitudes[-1]
        last = positive[-1][1]
        field = last >> mantissa
        power = field - bias if field or not zero else 1 - bias
        self.phantom = top + Fraction(2) ** (power - mantissa)  # what would follow the largest number
        self.max = top
        self.has_infinity = "inf" in self.codes
        self.has_nan = "nan" in self.codes
        self.has_negative_zero = signed and zero and specials != "fnuz"

    def value(self, code):
        """A Fraction, "inf", "-inf", "nan" (also for codes that mean nothing); −0 is the Fraction 0."""
        below = code % 2 ** (self.exponent + self.mantissa)
        negative = code != below
        field, fraction = divmod(below, 2**self.mantissa)
        if self.specials == "fnuz" and negative and below == 0:
            return "nan"
        if self.specials == "fn" and below == 2 ** (self.exponent + self.mantissa) - 1:
            return "nan"
        if self.specials == "ieee" and field == 2**self.exponent - 1:
            return "nan" if fraction else ("-inf" if negative else "inf")
        part = Fraction(fraction, 2**self.mantissa)
        if field == 0 and self.zero:
            if part and not self.subnormals:
                return "nan"
            result = part * Fraction(2) ** (1 - self.bias)
        else:
            result = (1 + part) * Fraction(2) ** (field - self.bias)
        return -result if negative else result

    def table(self):
        """Every code's value as float64."""
        sign_bit = 2 ** (self.exponent + self.mantissa)
        return np.array(
            [
                math.copysign(float(v), -1 if c >= sign_bit and self.signed else 1)
                if isinstance(v, Fraction)
                else float(v)
                for c, v in enumerate(self.codes)
            ]
        )

    def round(self, x: float, rounding: str, saturate: bool) -> float:
        """One number, exactly; needs ``signed``."""
        if math.isnan(x):
            return math.nan
        negative = math.copysign(1, x) < 0
        sign = -1.0 if negative else 1.0
        overflow = sign * (math.inf if self.has_infinity else math.nan)
        if math.isinf(x):
            return sign * float(self.max) if saturate else overflow
        exact = abs(Fraction(x))
        away = {"up": not negative, "down": negative, "toward-zero": False}
        if exact > self.max:
            if rounding in away:
                beyond = away[rounding]
            elif exact >= self.phantom:
                beyond = True
            else:
                middle = (self.max + self.phantom) / 2
                beyond = exact > middle or (exact == middle and (rounding == "nearest-away" or self.parity[-1] == 1))
            return overflow if beyond and not saturate else sign * float(self.max)
        above = next(i for i, v in enumerate(self.magnitudes) if v >= exact)
        if self.magnitudes[above] == exact:
            result = exact
        else:
            low, high = self.magnitudes[above - 1], self.magnitudes[above]
            middle = (low + high) / 2
            if rounding in away:
                result = high if away[rounding] else low
            elif exact != middle:
                result = high if exact > middle else low
            else:
                result = high if rounding == "nearest-away" or self.parity[above - 1] else low
        if result == 0:
            return -0.0 if negative and self.has_negative_zero else 0.0
        return sign * float(result)

    def round_array(self, x: np.ndarray, rounding: str, saturate: bool) -> np.ndarray:
        """``round`` of a float64 array."""
        grid = np.array([float(v) for v in (*self.magnitudes, self.phantom)])
        odd = np.array([*self.parity, 0], bool)
        size = np.abs(x)
        size = np.where(np.isnan(size), 0, size)
        below = np.clip(np.searchsorted(grid, size, "right") - 1, 0, len(grid) - 2)
        low, high = grid[below], grid[below + 1]
        middle = low + (high - low) / 2
        negative = np.signbit(x)
        if rounding == "nearest-even":
            up = (size > middle) | ((size == middle) & odd[below])
        elif rounding == "nearest-away":
            up = size >= middle
        elif rounding == "toward-zero":
            up = np.zeros_like(negative)
        else:
            up = (size > low) & (negative == (rounding == "down"))
        result = np.where(up, high, low)
        stops = ~up if rounding in ("toward-zero", "up", "down") else np.zeros_like(negative)
        over = ((result >= grid[-1]) | (size >= grid[-1])) & ~stops | np.isinf(x)
        result = np.where(over, grid[-2] if saturate else np.inf if self.has_infinity else np.nan, result)
        result = np.copysign(result, x)
        if not self.has_negative_zero:
            result = np.where(result == 0, 0.0, result)
        return np.where(np.isnan(x), np.nan, result)

    def gfloat(self) -> FormatInfo:
        """The same format for gfloat; it has no words for missing subnormals."""
        return FormatInfo(
            "slow",
            self.signed + self.exponent + self.mantissa,
            self.mantissa + 1,
            bias=self.bias,
            is_signed=self.signed,
            domain=Domain.Extended if self.specials == "ieee" else Domain.Finite,
            has_nz=self.has_negative_zero,
            num_high_nans={"ieee": 2**self.mantissa - 1, "fn": 1}.get(self.specials, 0),
            has_subnormals=self.subnormals,
            is_twos_complement=False,
        )


@functools.cache
def slow(fmt) -> Slow:
    """The Slow of an octavo FloatFormat."""
    return Slow(fmt.exponent, fmt.mantissa, int(fmt.bias), fmt.specials, fmt.subnormals, fmt.signed, fmt.zero)


def probes(law: Slow, count: int, seed: int = 0) -> np.ndarray:
    """float64 values: random over and beyond the range, every grid value, every tie, and what lies beside them."""
    rng = np.random.default_rng(seed)
    grid = np.array([float(v) for v in (*law.magnitudes, law.phantom)])
    if len(grid) > 1200:
        grid = np.concatenate([grid[:300], rng.choice(grid, 600), grid[-300:]])
    grid = np.sort(np.unique(grid))
    ties = (grid[1:] + grid[:-1]) / 2
    exact = np.concatenate([grid, ties, [float(law.max) * 2, float(law.phantom) * 1.5]])
    with np.errstate(over="ignore", under="ignore"):
        near = exact.astype(np.float32)
        beside = np.concatenate(
            [np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(0))], dtype=np.float64
        )
        doubles = np.concatenate([np.nextafter(exact, np.inf), np.nextafter(exact, 0)])
    top = np.log2(float(law.max))
    bottom = np.log2(float(law.magnitudes[1] if law.magnitudes[0] == 0 else law.magnitudes[0]))
    uniform = rng.uniform(-1, 1, count // 2) * float(law.max) * 1.1
    spread = np.exp2(rng.uniform(bottom - 3, min(top + 3, 127.9), count - count // 2))
    doubles = doubles[
        doubles > 1e-290
    ]  # the law multiplies float64 by powers of two: their subnormals are too far down
    values = np.concatenate([exact, beside, doubles, np.abs(uniform), spread, [0.0, np.inf, 2.0**-149, 2.0**-126]])
    return np.concatenate([values, -values, [np.nan, -np.nan]])
