"""The law: every operator in plain torch, written to be read, on any device. Faster kernels must equal these.

Arithmetic runs in float64, where every step is exact for grids that fit float32: dividing by a power of two, taking the
integer part, comparing the fraction with one half. Overflow follows IEEE 754: a value is rounded as if the exponent had
no upper bound, then compared with the limits; directed roundings toward zero stop at the limit.
"""

import torch
from torch import Tensor

from octavo.ops.schema import LIBRARY, code_dtype


def pow2(exponent: Tensor) -> Tensor:
    """2**exponent in float64, exactly, for integer exponents within ±1022 (``torch.exp2`` promises less)."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def exponent_of(magnitude: Tensor, least: int) -> Tensor:
    """max(⌊log2 magnitude⌋, least), exactly; capped at 1000, far above any format: powers of two stay finite."""
    exponent = torch.frexp(magnitude)[1].long() - 1
    return exponent.where(magnitude > 0, least).clamp(least, 1000)


def cast(
    x: Tensor,
    mantissa: int,
    emin: int,
    low: float,
    high: float,
    rounding: str,
    overflow: str,
    flush: bool,
    negative_zero: bool,
    noise: Tensor | None = None,
) -> Tensor:
    """Round to a number grid; see ``schema.cast``."""
    exact = x.double().contiguous()
    magnitude = exact.abs()
    finite = magnitude.isfinite()
    magnitude = magnitude.where(finite, 0.0)

    exponent = exponent_of(magnitude, emin)
    spacing = exponent - mantissa
    if flush:
        spacing = spacing.where(magnitude >= 2.0**emin, emin)
    steps = magnitude * pow2(-spacing)
    whole = steps.floor()
    fraction = steps - whole
    negative = exact < 0

    if rounding == "nearest-even":
        odd = whole % 2 == 1
        if mantissa == 0:  # the last bit of a power of two is that of its exponent field
            odd = odd & ((exponent - emin) % 2 == 0)
        away = (fraction > 0.5) | ((fraction == 0.5) & odd)
    elif rounding == "nearest-away":
        away = fraction >= 0.5
    elif rounding == "toward-zero":
        away = torch.zeros_like(finite)
    elif rounding == "up":
        away = (fraction > 0) & ~negative
    elif rounding == "down":
        away = (fraction > 0) & negative
    elif rounding == "stochastic" and noise is not None:
        away = fraction + noise.double() >= 1
    else:
        raise ValueError(f"unknown rounding {rounding!r}, or stochastic rounding without noise")

    y = (whole + away) * pow2(spacing)
    y = y.where(finite, float("inf")).copysign(exact)
    y = _limit(y, exact, low, high, rounding, overflow)
    if not negative_zero:
        y = y + 0.0  # −0 + 0 = +0
    return y.where(~exact.isnan(), exact).to(x.dtype)


def _limit(y: Tensor, x: Tensor, low: float, high: float, rounding: str, overflow: str) -> Tensor:
    over, under = y > high, (y < low) & (x < 0)
    if overflow == "saturate":
        return y.clamp(low, high)
    beyond = float("inf") if overflow == "inf" else float("nan")
    stops_above = x.isfinite() & (rounding in ("toward-zero", "down"))
    stops_below = x.isfinite() & (rounding in ("toward-zero", "up"))
    y = y.where(~over, torch.full_like(y, beyond).where(~stops_above, high))
    y = y.where(~under, torch.full_like(y, -beyond).where(~stops_below, low))
    return y.where(y.isnan() | y.isinf(), y.clamp(low, high))  # a positive result below ``low``: a format without zero


def encode(x: Tensor, mantissa: int, emin: int, first: int, bits: int, signed: bool, inf: int, nan: int) -> Tensor:
    """Codes of values on a grid; see ``schema.encode``."""
    exact = x.double().contiguous()
    magnitude = exact.abs().where(exact.isfinite(), 0.0)
    exponent = exponent_of(magnitude, emin)
    # the significand as an integer, leading one included; the leading one adds itself to the exponent field
    significand = (magnitude * pow2(mantissa - exponent)).long()
    code = ((exponent - emin + first - 1) << mantissa) + significand
    if inf >= 0:
        code = code.where(~exact.isinf(), inf)
    code = code.where(~exact.isnan(), nan) if nan >= 0 else code
    if signed:
        sign = 1 << (bits - 1)
        negative = exact.signbit() & ~(exact.isnan() if nan == sign else torch.zeros_like(exact, dtype=torch.bool))
        code = code + negative * sign
    return code.to(code_dtype(bits))


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """The values behind codes; see ``schema.decode``."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Integer matmul through float64, where sums below 2**53 are exact; see ``schema.int_mm``."""
    return (a.double() @ b.double().mT).to(torch.int32)


def float_mm(a: Tensor, b: Tensor) -> Tensor:
    """FP32 matmul of the same values; see ``schema.float_mm``."""
    return a.float() @ b.float().mT


for _op in (cast, encode, decode, int_mm, float_mm):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
