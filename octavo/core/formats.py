"""What a number is. A format is data: bit counts, bias, specials; every limit and every code is derived from them.

A float of E exponent bits, M mantissa bits and bias b has the values ``±2**(field − b) · 1.mantissa``, and below the
smallest normal number ``±2**(1 − b) · 0.mantissa``. What the top codes mean is the format's ``specials``:

- ``"ieee"``  the top exponent field holds infinities and NaNs, as in IEEE 754;
- ``"fn"``    finite, one NaN code a sign, all ones (OCP E4M3, https://arxiv.org/abs/2209.05433);
- ``"fnuz"``  finite, one NaN in the place of −0, so zero is unsigned (https://arxiv.org/abs/2206.02915);
- ``"none"``  numbers only, as in the papers of Qualcomm (https://arxiv.org/abs/2208.09225) and IBM.

The catalogue at the end names the formats of the literature. The same name means different things to different authors;
where that is so the comment says whose it is.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from octavo import ops
from octavo.errors import OctavoError
from octavo.ops.schema import code_dtype

Specials = Literal["ieee", "fn", "fnuz", "none"]
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
MOST_CODE_BITS = 20  # beyond this the table of all values is no longer a small thing


class Grid(NamedTuple):
    """A format as the operators see it; see ``octavo.ops.schema``."""

    mantissa: int
    emin: int
    low: float
    high: float


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format. Build one with ``float_format``, which fills in the bias and a name.

    ``bias`` may be real, as where it is learned: then every value is that of the next lower integer bias times
    ``2**-(bias − ⌊bias⌋)``. ``subnormals=False`` leaves only zero below the smallest normal number; ``zero=False`` is
    for pure scales such as E8M0, whose every code is a power of two. The whole format must fit float32.
    """

    name: str
    exponent: int
    mantissa: int
    bias: float
    specials: Specials = "ieee"
    subnormals: bool = True
    signed: bool = True
    zero: bool = True

    def __post_init__(self) -> None:
        def wrong(why: str) -> OctavoError:
            return OctavoError(f"float format {self.name!r} cannot be: {why}")

        if self.specials not in get_args(Specials):
            raise wrong(f"specials must be one of {', '.join(get_args(Specials))}, not {self.specials!r}")
        if not (1 <= self.exponent <= 8 and 0 <= self.mantissa <= 23):
            raise wrong("it needs 1 to 8 exponent bits and 0 to 23 mantissa bits")
        if not abs(self.bias) < 512:  # NaN too
            raise wrong(f"with a bias of {self.bias:g} its values are none that float32 can hold")
        if self._top_field < (1 if self.zero else 0) and self.mantissa == 0:
            raise wrong("its special values leave no number; give it more bits or specials='none'")
        if self._top_field == 0 and self.zero and not self.subnormals:
            raise wrong("without subnormals no number but zero is left; give it more exponent bits")
        if self.specials == "fnuz" and not self.signed:
            raise wrong("'fnuz' puts NaN in the place of −0, so it must be signed")
        if not self.zero and self.subnormals:
            raise wrong("without zero there are no subnormals either; pass subnormals=False")
        least = self.emin - (self.mantissa if self.subnormals else 0)
        if least < -149 or self.max > FLOAT32_MAX:
            raise wrong(f"its values run from 2**{least} to {self.max:g}, which float32 cannot hold; mind the bias")

    @property
    def bits(self) -> int:
        """Bits of one number, sign included."""
        return self.signed + self.exponent + self.mantissa

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, counted with the integer part of the bias."""
        return (1 if self.zero else 0) - math.floor(self.bias)

    @property
    def _top_field(self) -> int:
        """The highest exponent field that holds numbers."""
        reserved = self.specials == "ieee" or (self.specials == "fn" and self.mantissa == 0)
        return (1 << self.exponent) - 1 - reserved

    @property
    def stretch(self) -> float:
        """``2**-(bias − ⌊bias⌋)``: 1 unless the bias is fractional."""
        return math.pow(2.0, math.floor(self.bias) - self.bias)

    @property
    def grid(self) -> Grid:
        """The format with its bias rounded down to an integer, as the operators take it."""
        significand = 2.0 - 2.0**-self.mantissa
        if self.specials == "fn" and self.mantissa:
            significand -= 2.0**-self.mantissa  # all ones is NaN
        if self._top_field == 0 and self.zero:  # only subnormals are left
            high = math.ldexp(significand - 1, self.emin)
        else:
            high = math.ldexp(significand, self._top_field - math.floor(self.bias))
        low = -high if self.signed else (0.0 if self.zero else math.ldexp(1.0, self.emin))
        return Grid(self.mantissa, self.emin, low, high)

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.grid.high * self.stretch

    @property
    def min(self) -> float:
        """The lowest finite value: ``-max``, or what is least in an unsigned format."""
        return self.grid.low * self.stretch

    @property
    def min_normal(self) -> float:
        """The smallest positive number of full precision."""
        return math.ldexp(self.stretch, self.emin)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive number."""
        return math.ldexp(self.stretch, self.emin - (self.mantissa if self.subnormals else 0))

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next larger number, ``2**-mantissa``."""
        return 2.0**-self.mantissa

    @property
    def has_infinity(self) -> bool:
        """Whether ±∞ have codes."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether NaN has a code; "ieee" without mantissa bits has only infinities there."""
        return self.specials in ("fn", "fnuz") or (self.specials == "ieee" and self.mantissa > 0)

    @property
    def has_negative_zero(self) -> bool:
        """Whether −0 has a code of its own."""
        return self.signed and self.zero and self.specials != "fnuz"

    @property
    def sign_bit(self) -> int:
        """The sign bit's value within a code; 0 in an unsigned format."""
        return self.signed << (self.exponent + self.mantissa)

    @property
    def infinity_code(self) -> int:
        """The code of +∞, −1 if there is none."""
        return (2**self.exponent - 1) << self.mantissa if self.has_infinity else -1

    @property
    def nan_code(self) -> int:
        """The code of NaN that ``encode`` writes, −1 if there is none; quiet and positive where there are several."""
        if not self.has_nan:
            return -1
        if self.specials == "fnuz":
            return self.sign_bit
        if self.specials == "fn":
            return (1 << (self.exponent + self.mantissa)) - 1
        return self.infinity_code + (1 << (self.mantissa - 1))

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that codes are stored in: uint8 up to 8 bits, int32 above."""
        return code_dtype(self.bits)

    @cached_property
    def table(self) -> Tensor:
        """The value of every code, float64 [2**bits]: codes whose bits mean nothing in this format are NaN."""
        if self.bits > MOST_CODE_BITS:
            raise OctavoError(f"{self.name} has {self.bits} bits; codes are made for at most {MOST_CODE_BITS}")
        codes = torch.arange(2**self.bits)
        magnitude = codes & (2 ** (self.exponent + self.mantissa) - 1)
        field, fraction = magnitude >> self.mantissa, magnitude & (2**self.mantissa - 1)
        normal = (field > 0) | (not self.zero)
        power = torch.where(normal, field - math.floor(self.bias), self.emin)
        value = (fraction.double() * self.epsilon + normal.double()) * ops.reference.pow2(power)
        if not self.subnormals:
            value = value.where(normal | (fraction == 0), math.nan)
        if self.specials == "ieee":
            top = field == 2**self.exponent - 1
            value = value.where(~top, torch.where(fraction == 0, math.inf, math.nan))
        if self.specials == "fn":
            value = value.where(magnitude != self.nan_code, math.nan)
        if self.signed:
            value = value.copysign(torch.where(codes >= self.sign_bit, -1.0, 1.0))
        if self.specials == "fnuz":
            value[self.sign_bit] = math.nan
        table: Tensor = value * self.stretch
        return table

    def table_in(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``table`` in another dtype and place, made once."""
        return _table_in(self, dtype, device)

    @property
    def exact_in_bfloat16(self) -> bool:
        """Whether every value is a bfloat16 and every product of two a float32: then a BF16 matmul is exact."""
        small = self.min_subnormal >= 2.0**-63 and self.max < 2.0**63
        return self.mantissa <= 7 and self.stretch == 1 and small

    def values(self) -> Tensor:
        """Every finite value once, ascending, float64."""
        finite: Tensor = self.table[self.table.isfinite()].unique()
        return finite

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class IntegerFormat:
    """The integers from ``low`` to ``high``; what scale and zero point make of them is the quantizer's matter."""

    name: str
    low: int
    high: int

    def __post_init__(self) -> None:
        if not -(2**23) <= self.low <= 0 < self.high < 2**23:
            raise OctavoError(f"integer format {self.name!r} must hold 0, some positive number, and fit in 24 bits")

    specials = "none"
    exponent = 0
    stretch = 1.0
    has_infinity = has_nan = has_negative_zero = False
    subnormals = zero = True
    min_normal = min_subnormal = epsilon = 1.0

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return max(self.high.bit_length(), (~self.low).bit_length()) + self.signed

    @property
    def signed(self) -> bool:
        """Whether there are negative numbers."""
        return self.low < 0

    @property
    def max(self) -> float:
        """The largest integer."""
        return float(self.high)

    @property
    def min(self) -> float:
        """The lowest integer."""
        return float(self.low)

    @property
    def grid(self) -> Grid:
        """A float grid of subnormals one apart."""
        return Grid(23, 23, float(self.low), float(self.high))

    @property
    def exact_in_bfloat16(self) -> bool:
        """Whether every integer of the range, less any zero point, is a bfloat16."""
        return self.high - self.low <= 256

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest torch integer that holds the range."""
        for dtype in (torch.int8, torch.uint8, torch.int16):
            if torch.iinfo(dtype).min <= self.low and self.high <= torch.iinfo(dtype).max:
                return dtype
        return torch.int32

    def values(self) -> Tensor:
        """Every integer of the range, ascending, float64."""
        return torch.arange(self.low, self.high + 1, dtype=torch.float64)

    def __str__(self) -> str:
        return self.name


Format = FloatFormat | IntegerFormat


@lru_cache(maxsize=64)
def _table_in(fmt: FloatFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    return fmt.table.to(device=device, dtype=dtype)


def float_format(
    exponent: int,
    mantissa: int,
    bias: float | None = None,
    specials: Specials = "ieee",
    subnormals: bool = True,
    *,
    signed: bool = True,
    zero: bool = True,
    name: str | None = None,
) -> FloatFormat:
    """Describe any float format that fits float32.

    ``bias`` defaults to the IEEE ``2**(exponent − 1) − 1``. Raises ``OctavoError`` for a format that cannot be.
    """
    if type(exponent) is not int or type(mantissa) is not int or not -64 < exponent < 64:
        raise OctavoError(f"a float format has whole, small bit counts, not {exponent!r} and {mantissa!r}")
    usual = 2 ** (exponent - 1) - 1 if exponent > 0 else 0
    bias = usual if bias is None else bias
    if not isinstance(bias, int | float):
        raise OctavoError(f"a bias is a number, not {bias!r}")
    bias = int(bias) if float(bias).is_integer() else float(bias)
    if name is None:
        name = f"E{exponent}M{mantissa}" + (f"B{bias:g}" if bias != usual else "")
        name += {"ieee": "", "fn": "FN", "fnuz": "FNUZ", "none": "N"}.get(specials, "")
    return FloatFormat(name, exponent, mantissa, bias, specials, subnormals and zero, signed, zero)


def integer_format(bits: int, signed: bool = True, name: str | None = None) -> IntegerFormat:
    """Two's-complement or unsigned integers of 2 to 23 bits."""
    if not 2 <= bits <= 23:
        raise OctavoError(f"an integer format has 2 to 23 bits, not {bits}")
    low = -(2 ** (bits - 1)) if signed else 0
    return IntegerFormat(name or f"{'' if signed else 'U'}INT{bits}", low, low + 2**bits - 1)


# OCP, NVIDIA, Arm, Intel (2209.05433). E4M3 is the IEEE-style sibling of E4M3FN: 240 instead of 448.
E4M3FN = float_format(4, 3, 7, "fn", name="E4M3FN")
E4M3 = float_format(4, 3, 7, "ieee", name="E4M3")
E5M2 = float_format(5, 2, 15, "ieee", name="E5M2")
E3M4 = float_format(3, 4, 3, "ieee", name="E3M4")
# Graphcore and AMD (2206.02915)
E4M3FNUZ = float_format(4, 3, 8, "fnuz", name="E4M3FNUZ")
E5M2FNUZ = float_format(5, 2, 16, "fnuz", name="E5M2FNUZ")
# Qualcomm (2208.09225): bias 2**(E − 1), subnormals, no specials
E2M5 = float_format(2, 5, 2, "none", name="E2M5")
QUALCOMM_E3M4 = float_format(3, 4, 4, "none", name="QUALCOMM_E3M4")
QUALCOMM_E4M3 = float_format(4, 3, 8, "none", name="QUALCOMM_E4M3")
QUALCOMM_E5M2 = float_format(5, 2, 16, "none", name="QUALCOMM_E5M2")
# IBM: HFP8 (NeurIPS 2019) forward 1-4-3 with bias 11, backward 1-5-2, internal products 1-5-3; and the accumulator
# 1-6-9 of 2018 (1812.08011)
HFP8_143 = float_format(4, 3, 11, "fnuz", name="HFP8_143")
HFP8_152 = float_format(5, 2, 15, "ieee", name="HFP8_152")
HFP9_153 = float_format(5, 3, 15, "ieee", name="HFP9_153")
FP16_169 = float_format(6, 9, 31, "none", subnormals=False, name="FP16_169")
# DeepSeek-V3 (2412.19437): inputs that come from attention outputs
E5M6 = float_format(5, 6, 15, "ieee", name="E5M6")
# wider and narrower, for comparison, and the power-of-two scale of OCP's MX formats
FP16 = float_format(5, 10, 15, "ieee", name="FP16")
BF16 = float_format(8, 7, 127, "ieee", name="BF16")
TF32 = float_format(8, 10, 127, "ieee", name="TF32")
E3M2 = float_format(3, 2, 3, "none", name="E3M2")
E2M3 = float_format(2, 3, 1, "none", name="E2M3")
E2M1 = float_format(2, 1, 1, "none", name="E2M1")
E8M0 = float_format(8, 0, 127, "fn", signed=False, zero=False, name="E8M0")
INT8 = integer_format(8)
UINT8 = integer_format(8, signed=False)
INT16 = integer_format(16)
INT4 = integer_format(4)

CATALOGUE: tuple[Format, ...] = (
    *(E4M3FN, E4M3, E5M2, E3M4, E2M5, E4M3FNUZ, E5M2FNUZ),
    *(QUALCOMM_E3M4, QUALCOMM_E4M3, QUALCOMM_E5M2, HFP8_143, HFP8_152, HFP9_153),
    *(FP16_169, E5M6, FP16, BF16, TF32, E3M2, E2M3, E2M1, E8M0, INT8, UINT8, INT16, INT4),
)

#: Other names by which people and torch call them.
ALIASES: dict[str, str] = {
    "fp8": "E4M3FN",
    "float8_e4m3fn": "E4M3FN",
    "float8_e4m3": "E4M3",
    "float8_e5m2": "E5M2",
    "float8_e3m4": "E3M4",
    "float8_e4m3fnuz": "E4M3FNUZ",
    "float8_e5m2fnuz": "E5M2FNUZ",
    "float8_e4m3b11fnuz": "HFP8_143",
    "e4m3b11fnuz": "HFP8_143",
    "float8_e8m0fnu": "E8M0",
    "float16": "FP16",
    "half": "FP16",
    "bfloat16": "BF16",
    "ibm_169": "FP16_169",
    "fp4": "E2M1",
}


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Format]:
    named = {f.name.lower(): f for f in CATALOGUE}
    return named | {alias: named[name.lower()] for alias, name in ALIASES.items()}


def get(name: "str | torch.dtype | Format") -> Format:
    """The format of that name (any case, ``-`` or ``_``), of that torch dtype, or the format itself."""
    if isinstance(name, FloatFormat | IntegerFormat):
        return name
    key = str(name).removeprefix("torch.").lower().replace("-", "_").strip()
    found = _by_name().get(key)
    if found is None:
        near = difflib.get_close_matches(key, list(_by_name()), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `octavo formats`"
        raise OctavoError(f"no format is called {name!r}; {hint} Describe your own with octavo.formats.float_format(…)")
    return found


def eight_bit() -> Iterator[Format]:
    """The catalogue's formats of exactly eight bits that can hold a signed tensor."""
    return (f for f in CATALOGUE if f.bits == 8 and f.signed)
