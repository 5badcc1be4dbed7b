"""Number grids as ``cast.c`` takes them: boiled down to integers that compare with bit patterns of float32."""

import ctypes
import functools
import math

from octavo.ops.schema import OVERFLOWS, ROUNDINGS

SIGN = 1 << 31
INFINITY = 0x7F800000
NAN = 0x7FC00000


class Even(ctypes.Structure):
    """What ``common.h`` calls Even: a number grid with the usual rounding."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("low", "high")),
        *((name, ctypes.c_uint32) for name in ("normal", "lift", "zero_sign")),
    )


class Grid(ctypes.Structure):
    """What ``cast.c`` calls Grid: a number grid and a rounding, boiled down to integers."""

    _fields_ = (
        ("mantissa", ctypes.c_int32),
        ("emin", ctypes.c_int32),
        ("qmin", ctypes.c_int32),
        ("step", ctypes.c_uint32),
        ("nearest", ctypes.c_uint32),
        ("tie", ctypes.c_uint32),
        ("parity", ctypes.c_uint32),
        ("away", ctypes.c_uint32 * 2),
        ("limit", ctypes.c_uint32 * 2),
        ("overflow", ctypes.c_uint32 * 2),
        ("infinite", ctypes.c_uint32 * 2),
        ("bottom", ctypes.c_uint32),
        ("least", ctypes.c_uint32),
        ("zero_sign", ctypes.c_uint32),
        ("quick", ctypes.c_int32),
        ("even", Even),
    )


@functools.lru_cache(maxsize=256)
def described(
    mantissa: int, emin: int, low: float, high: float, rounding: str, overflow: str, flush: bool, negative_zero: bool
) -> Grid | None:
    """The kernel's description of a grid; None beyond its range: quanta under 2⁻¹⁴⁹, limits that float32 lacks."""
    qmin = emin if flush else emin - mantissa
    known = rounding in ROUNDINGS and overflow in OVERFLOWS
    if not (known and 0 <= mantissa <= 23 and emin - mantissa >= -149 and qmin <= 127 and low <= high and high > 0):
        return None
    least, most, step = _bits(low), _bits(high), _bits(2.0**qmin)
    if least is None or most is None or step is None:
        return None
    ends = (most, least | SIGN if low < 0 else least)
    beyond = {"saturate": ends, "inf": (INFINITY, INFINITY | SIGN), "nan": (NAN, NAN)}[overflow]
    even = even_grid(mantissa, emin, low, high, flush, negative_zero)
    usual = rounding == "nearest-even" and overflow == "saturate"
    stops = (rounding in ("toward-zero", "down"), rounding in ("toward-zero", "up"))  # IEEE 754: not past the limit
    ones = 2**32 - 1
    return Grid(
        mantissa=mantissa,
        emin=emin + 127,
        qmin=qmin + 127,
        step=2 * step,
        nearest=ones * rounding.startswith("nearest"),
        tie=ones * (rounding == "nearest-even"),
        parity=int(mantissa > 0),
        away=(ones * (rounding == "up"), ones * (rounding == "down")),
        limit=(2 * most + 1, 0 if low > 0 else 2 * least + 1),
        overflow=tuple(end if stop else other for end, stop, other in zip(ends, stops, beyond, strict=True)),
        infinite=beyond,
        bottom=2 * least if low > 0 else 0,
        least=least,
        zero_sign=SIGN * negative_zero,
        quick=usual and even is not None,
        even=even or Even(),
    )


def even_grid(mantissa: int, emin: int, low: float, high: float, flush: bool, negative_zero: bool) -> Even | None:
    """The grid for ``round_even``, or None where that does not serve.

    It wants the quantum of every number to be that of its exponent or of ``emin``, ties that are even where the
    mantissa is, half a quantum that is a normal number, limits on the grid, and float32 to hold 2**23 quanta of any.
    """
    most = max(-low, high)
    if flush or not (0 < mantissa <= 23 and emin <= 127 and emin - mantissa > -126 and low <= 0 < high):
        return None
    if not all(_on_grid(edge, mantissa, emin) for edge in (low, high)) or (low == 0 and negative_zero):
        return None
    top = max(math.frexp(most)[1] - 1, emin)
    if top + 23 - mantissa > 127 or (mantissa == 23 and most >= 2.0**emin):
        return None
    return Even(
        low=low, high=high, normal=(emin + 127) << 23, lift=(23 - mantissa) << 23, zero_sign=SIGN * negative_zero
    )


def _on_grid(value: float, mantissa: int, emin: int) -> bool:
    if value == 0 or not math.isfinite(value):
        return value == 0
    exponent = max(math.frexp(value)[1] - 1, emin)
    return math.ldexp(value, mantissa - exponent).is_integer()


def _bits(value: float) -> int | None:
    """The float32 pattern of |value|, None if there is none; in integers, so that no flush-to-zero mode matters."""
    if not abs(value) < 2.0**128:
        return None
    units = math.ldexp(abs(value), 149)  # of the smallest subnormal
    if not units.is_integer():
        return None
    shift = max(int(units).bit_length() - 24, 0)
    significand = int(units) >> shift
    return (shift << 23) + significand if significand << shift == units else None
