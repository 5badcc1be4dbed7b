"""From int32 sums to 8-bit codes by integers alone, as gemmlowp and TensorFlow Lite do it (1712.05877, section 2.2).

A product of codes is worth ``scale_a · scale_b`` a unit and its result ``scale`` a unit. Their quotient M is kept as
``multiplier · 2**(shift − 31)``, a 32-bit integer of [2**30, 2**31) and a power of two, and applied by two roundings:

1. ``rounding_doubling_high_mul``: the high half of ``2 · x · multiplier``, rounded half up (``2**30``, or ``1 − 2**30``
   for negative products, is added and the division by ``2**31`` truncates), the one overflow saturated;
2. ``rounding_divide_by_power_of_two``: the shift right, rounded half away from zero.

M ≥ 1 shifts x left first, saturating. The roundings are those of gemmlowp's ``fixedpoint.h``, bit for bit.
"""

import torch
from torch import Tensor

from octavo.core import formats
from octavo.core.formats import INT8, IntegerFormat
from octavo.core.matmul import LONGEST, column, integer_sums, signed_codes
from octavo.core.qtensor import QTensor
from octavo.errors import OctavoError

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1
LEAST_SHIFT, MOST_SHIFT = -31, 30  # what fixed_point gives, and what 32-bit registers can be shifted by


def fixed_point(real: "float | Tensor") -> tuple[Tensor, Tensor]:
    """Real multipliers, a float or a float64 tensor of any shape, as int32 ``(multiplier, shift)`` of that shape.

    ``real ≈ multiplier · 2**(shift − 31)`` with ``2**30 ≤ multiplier < 2**31``; below 2**−32 both are 0. Raises
    ``OctavoError`` for what is negative, not finite, or at least 2**30.
    """
    value = torch.as_tensor(real, dtype=torch.float64)
    if not bool(((value >= 0) & (value < 2.0**30)).all()):
        raise OctavoError(f"multipliers lie in [0, 2**30): {value[~((value >= 0) & (value < 2.0**30))].flatten()[0]:g}")
    significand, shift = torch.frexp(value)
    multiplier = (significand * 2.0**31 + 0.5).floor().long()  # half away from zero, like std::round
    carried = multiplier == 1 << 31
    multiplier, shift = torch.where(carried, multiplier // 2, multiplier), shift + carried
    nothing = (shift < -31) | (multiplier == 0)
    return multiplier.masked_fill(nothing, 0).int(), shift.masked_fill(nothing, 0).int()


def rounding_doubling_high_mul(x: Tensor, multiplier: Tensor) -> Tensor:
    """``x · multiplier / 2**31`` of int32 values, rounded to nearest, ties upward; int64 within int32's range.

    gemmlowp's SaturatingRoundingDoublingHighMul: only ``(−2**31)²`` overflows, and gives 2**31 − 1.
    """
    product = x.long() * multiplier.long()
    nudge = torch.where(product >= 0, 1 << 30, 1 - (1 << 30))
    quotient = torch.div(product + nudge, 1 << 31, rounding_mode="trunc")
    return quotient.clamp(max=INT32_MAX)


def rounding_divide_by_power_of_two(x: Tensor, exponent: "int | Tensor") -> Tensor:
    """``x / 2**exponent`` of integers, rounded to nearest, ties away from zero; 0 ≤ exponent ≤ 31; int64.

    gemmlowp's RoundingDivideByPOT.
    """
    x, power = x.long(), torch.as_tensor(exponent, device=x.device).long()
    mask = (torch.ones_like(power) << power) - 1
    threshold = (mask >> 1) + (x < 0).long()
    return (x >> power) + ((x & mask) > threshold).long()


def multiply_fixed_point(x: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """int32 ``x`` times ``multiplier · 2**(shift − 31)``, which broadcast against it; int64 within int32's range."""
    raised = (x.long() << shift.clamp(min=0).long()).clamp(INT32_MIN, INT32_MAX)
    return rounding_divide_by_power_of_two(rounding_doubling_high_mul(raised, multiplier), (-shift).clamp(min=0))


def requantize(
    total: Tensor, multiplier: Tensor, shift: Tensor, zero_point: "int | Tensor" = 0, fmt: "IntegerFormat | str" = INT8
) -> Tensor:
    """int32 sums of any shape as codes of ``fmt``: times the fixed-point multiplier, plus the zero point, clamped.

    ``multiplier`` and ``shift`` (from ``fixed_point``) and ``zero_point`` broadcast against ``total``: a scalar for one
    scale, [N] for one a channel of a result [M, N]. Raises ``OctavoError`` for what is not integers of 32 bits, and for
    shifts beyond −31 … 30.
    """
    fmt = _integer_format(fmt)
    if total.dtype not in (torch.int32, torch.int16, torch.int8, torch.int64):
        raise OctavoError(f"requantize takes int32 sums, not {total.dtype}")
    if not _within(total, INT32_MIN, INT32_MAX):
        raise OctavoError("these sums do not fit 32 bits; integer-only requantization starts from an int32 accumulator")
    multiplier, shift = _integers(multiplier, "multipliers"), _integers(shift, "shifts")
    if not (_within(multiplier, INT32_MIN, INT32_MAX) and _within(shift, LEAST_SHIFT, MOST_SHIFT)):
        raise OctavoError(
            f"multipliers have 32 bits, shifts lie between {LEAST_SHIFT} and {MOST_SHIFT}; see fixed_point"
        )
    scaled = multiply_fixed_point(total, multiplier, shift) + _integers(zero_point, "zero points")
    return scaled.clamp(fmt.low, fmt.high).to(fmt.code_dtype)


def _integers(x: "int | Tensor", what: str) -> Tensor:
    x = torch.as_tensor(x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise OctavoError(f"{what} are integers, not {x.dtype}")
    return x


def _within(x: Tensor, low: int, high: int) -> bool:
    return x.numel() == 0 or low <= int(x.min()) <= int(x.max()) <= high


def _integer_format(fmt: "IntegerFormat | str") -> IntegerFormat:
    found = formats.get(fmt)
    if not isinstance(found, IntegerFormat):
        raise OctavoError(f"integer-only arithmetic ends in an integer format, not {found.name}")
    return found


def integer_matmul(
    a: QTensor,
    b: QTensor,
    scale: "float | Tensor",
    zero_point: "int | Tensor" = 0,
    fmt: "IntegerFormat | str" = INT8,
    bias: Tensor | None = None,
) -> QTensor:
    """``a @ b.T + bias`` from codes to codes without a float in between: a [M, K], b [N, K], the result [M, N].

    ``scale`` and ``zero_point`` are the result's, one for all. Sums carry the zero points' corrections,
    ``Σxw − zΣw − uΣx + Kzu``. ``bias`` [N] is int32 in units of ``scale_a · scale_b``. Multipliers are made of the
    scales in float64, ahead of any data. Raises ``OctavoError`` for float operands or bias, for scales that vary along
    K, and for sums beyond int32.
    """
    fmt = _integer_format(fmt)
    if not all(isinstance(q, QTensor) and isinstance(q.format, IntegerFormat) and q.format.bits <= 8 for q in (a, b)):
        names = [q.format.name if isinstance(q, QTensor) else type(q).__name__ for q in (a, b)]
        raise OctavoError(f"integer-only arithmetic takes QTensors of 8-bit integers, not {' and '.join(names)}")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise OctavoError(f"integer_matmul takes [M, K] and [N, K], not {list(a.shape)} and {list(b.shape)}")
    if a.scale.shape[1] != 1 or b.scale.shape[1] != 1:
        raise OctavoError("integer_matmul needs scales that do not vary along K: per tensor, channel or token")
    unit, zero = torch.as_tensor(scale, dtype=torch.float64), _integers(zero_point, "zero points")
    if unit.numel() != 1 or zero.numel() != 1:
        raise OctavoError("integer_matmul gives its result one scale and one zero point")
    if bias is not None and (tuple(bias.shape) != (b.shape[0],) or bias.dtype != torch.int32):
        raise OctavoError(f"the bias is int32 [{b.shape[0]}], not {bias.dtype} {list(bias.shape)}")
    (x, zx), (w, zw) = signed_codes(a), signed_codes(b)
    zx, zw = column(zx, a, 0), column(zw, b, 0)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int64, device=a.device)
    for start in range(0, a.shape[1], LONGEST):
        stop = min(start + LONGEST, a.shape[1])
        total += integer_sums(x[:, start:stop], w[:, start:stop], zx, zw)
    if bias is not None:
        total += bias.long()
    worth = column(a.scale, a, 0).double() * column(b.scale, b, 0).double().mT
    codes = requantize(total, *fixed_point(worth / unit.reshape(())), zero.reshape(()), fmt)
    offset = zero.int().reshape(1, 1) if int(zero) else None
    return QTensor(codes, unit.float().reshape(1, 1), offset, fmt, tuple(codes.shape), a.dtype)
