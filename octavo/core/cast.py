"""How one tensor becomes 8 bits (``Cast``), and the verbs that do it.

``cast``, ``encode`` and ``decode`` move between numbers and a format's grid. ``quantize`` adds scales: it is
``calibrate → scale → round → encode`` in that order.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from octavo import ops
from octavo.core import formats
from octavo.core.formats import FloatFormat, Format, IntegerFormat
from octavo.core.granularity import Granularity, PerTensor, expand_blocks, reduce_blocks, scale_shape
from octavo.core.qtensor import QTensor
from octavo.core.scaling import Current, Scale, compute_scale
from octavo.errors import OctavoError
from octavo.ops import ROUNDINGS, Rounding

#: Beyond the largest number: take the largest; ∞ or else NaN, as the format has it; or stop.
OverflowPolicy = Literal["saturate", "nonsaturating", "error"]


@dataclass(frozen=True)
class Cast:
    """How one tensor becomes 8 bits. Where a Cast is optional, ``None`` means: leave the tensor alone.

    ``affine`` gives integers a zero point and their whole range; without it integers are symmetric and the lowest code
    (−128) is unused. Quantizing always saturates.
    """

    format: Format
    granularity: Granularity = PerTensor()
    scale: Scale = Current()
    rounding: Rounding = "nearest-even"
    affine: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", formats.get(self.format))
        _check_rounding(self.rounding)
        if self.affine and isinstance(self.format, FloatFormat):
            raise OctavoError(f"a zero point needs an integer format, {self.format.name} is a float; use affine=False")
        if isinstance(self.format, FloatFormat) and not (self.format.signed and self.format.zero):
            raise OctavoError(f"{self.format.name} cannot hold a tensor of signed numbers; it is a format for scales")


def cast(
    x: Tensor,
    fmt: "Format | str",
    rounding: Rounding = "nearest-even",
    overflow: OverflowPolicy = "saturate",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round ``x`` to the numbers of a format; same dtype, shape and device, no gradient.

    Finite values beyond the limits and ±∞ become ±max under "saturate"; ±∞ (NaN, if the format has no infinity) under
    "nonsaturating"; an ``OctavoError`` under "error". NaN stays NaN, even where the format has no code for it. −0 stays
    −0 where the format has it. Where ``x.dtype`` is narrower than the format, a value it cannot hold is rounded to it.
    """
    fmt = formats.get(fmt)
    check_float(x)
    _check_rounding(rounding)
    y = _round(x.detach(), fmt, rounding, _kernel_overflow(fmt, overflow), _noise(x, rounding, generator))
    if not fmt.signed and overflow == "nonsaturating" and fmt.has_nan:
        y = y.where(~y.isneginf(), math.nan)  # an unsigned format has no −∞
    if overflow == "error" and x.numel():
        lost = (y.isnan() & ~x.isnan()) | (x.detach() > fmt.max) | (x.detach() < fmt.min)
        if lost.any():
            raise OctavoError(
                f"{int(lost.sum())} of {x.numel()} values do not fit {fmt.name} ({fmt.min:g} … {fmt.max:g}); "
                f"the largest magnitude is {x.detach()[lost].abs().max().item():g}. Scale it, or let it saturate"
            )
    return y


def cast_(
    x: Tensor,
    fmt: "Format | str",
    rounding: Rounding = "nearest-even",
    overflow: OverflowPolicy = "saturate",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``cast`` in place, without temporaries; returns ``x``. Where ``x`` has a history, its gradient becomes zero.

    As with torch's own operators, a leaf that requires its gradient is changed under ``torch.no_grad()`` only.
    """
    fmt = formats.get(fmt)
    check_float(x)
    _check_rounding(rounding)
    kernel_overflow = _kernel_overflow(fmt, overflow)

    def change() -> None:
        if overflow == "error" or fmt.stretch != 1 or not fmt.signed:  # these look at x again when it is rounded
            x.copy_(cast(x, fmt, rounding, overflow, generator))
        else:
            ops.cast_(x, *_kernel_grid(fmt, rounding, kernel_overflow), _noise(x, rounding, generator))

    return in_place(x, change, straight_through=False)


def encode(
    x: Tensor,
    fmt: "Format | str",
    rounding: Rounding = "nearest-even",
    overflow: OverflowPolicy = "saturate",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Round ``x`` to a format and give the integer codes (sign, exponent, mantissa from the top; two's complement).

    Raises ``OctavoError`` if ``x`` holds NaN and the format has no code for it.
    """
    fmt = formats.get(fmt)
    check_float(x)
    # not in the narrower dtypes: float16 lacks the largest numbers of some formats
    y = cast(x if x.dtype == torch.float64 else x.float(), fmt, rounding, overflow, generator)
    if not fmt.has_nan and bool(y.isnan().any()):
        raise OctavoError(f"x holds {int(y.isnan().sum())} NaN, for which {fmt.name} has no code; replace them first")
    return _codes(y, fmt)


def decode(codes: Tensor, fmt: "Format | str", dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers behind integer codes, in ``dtype``; every format of at most 8 bits is exact in bfloat16."""
    fmt = formats.get(fmt)
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise OctavoError(f"codes are integers, not {codes.dtype}")
    if isinstance(fmt, IntegerFormat):
        return codes.to(dtype)
    return ops.decode(codes, fmt.table_in(dtype, codes.device))


def quantize(x: Tensor, how: Cast, generator: torch.Generator | None = None) -> QTensor:
    """Scale, round and encode a tensor of any float dtype and shape. Raises ``OctavoError`` on NaN or Inf."""
    check_float(x)
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).sum())
        raise OctavoError(
            f"the tensor of shape {list(x.shape)} holds {bad} NaN or Inf; find where they come from first"
        )
    return quantize_unchecked(x, how, generator=generator)


def quantize_unchecked(
    x: Tensor, how: Cast, storage: torch.dtype = torch.float32, generator: torch.Generator | None = None
) -> QTensor:
    """``quantize`` for inner loops: no look for NaN and Inf, which make their whole block NaN instead.

    ``storage``: the dtype in which the scale will be kept; see ``compute_scale``.
    """
    x = x.detach()
    block = how.granularity.block(tuple(x.shape))
    if isinstance(how.scale, Current) and storage == torch.float32:
        quantized = _quantize_rows(x, how, block)
        if quantized is not None:
            return quantized
    scale, zero_point = compute_scale(x, block, how.format, how.scale, how.affine, storage)
    quantized = _quantize_rows(x, how, block, scale, zero_point)
    return _encode_scaled(x, how, block, scale, zero_point, generator) if quantized is None else quantized


def quantize_scaled(
    x: Tensor, how: Cast, scale: Tensor, zero_point: Tensor | None = None, generator: torch.Generator | None = None
) -> QTensor:
    """``quantize`` with scales that are known already; what lies beyond their range saturates.

    ``scale``: float32 with one element a block of ``how.granularity``, whatever its dimensions of size 1;
    ``zero_point``: int32 of the same shape, for affine Casts. NaN or Inf in ``x`` makes its block NaN, as in
    ``quantize_unchecked``. Raises ``OctavoError`` for scales that do not fit.
    """
    x = x.detach()
    block = how.granularity.block(tuple(x.shape))
    counts = scale_shape(tuple(x.shape), block)
    if [n for n in scale.shape if n != 1] != [n for n in counts if n != 1]:
        raise OctavoError(f"{how.granularity} of {list(x.shape)} has scales {list(counts)}, not {list(scale.shape)}")
    if (zero_point is not None) is not how.affine:
        raise OctavoError(f"{'an affine Cast needs' if how.affine else 'a symmetric Cast has no'} zero point")
    scale, zero_point = scale.reshape(counts), None if zero_point is None else zero_point.reshape(counts)
    quantized = _quantize_rows(x, how, block, scale, zero_point)
    if quantized is not None:
        return quantized
    low, high = reduce_blocks(x, block)
    scale = scale.where(low.isfinite() & high.isfinite(), math.nan)
    return _encode_scaled(x, how, block, scale, zero_point, generator)


def _quantize_rows(
    x: Tensor,
    how: Cast,
    block: tuple[int, ...],
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> QTensor | None:
    """The same as below in one pass, where blocks lie along rows, or one given scale serves all; else None."""
    numbers = row_format(how.format, how.affine) if how.rounding == "nearest-even" else None
    if numbers is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not x.dim() or not x.numel():
        return None
    counts = scale_shape(tuple(x.shape), block)
    along = all(size == 1 or n == 1 for size, n in zip(block[:-1], x.shape[:-1], strict=True))
    if not along and (scale is None or math.prod(counts) > 1):
        return None
    given = None
    if scale is not None:
        rows = (-1, counts[-1]) if along else (1, 1)
        given, zero_point = scale.reshape(rows), None if zero_point is None else zero_point.reshape(rows)
    group = block[-1] if along else x.shape[-1]
    power_of_two = isinstance(how.scale, Current) and how.scale.power_of_two
    codes, found, zeros = ops.quantize_rows(
        x.reshape(-1, x.shape[-1]), group, numbers, given, zero_point, how.affine, power_of_two
    )
    points = zeros.view(counts) if how.affine else None
    return QTensor(codes.view(x.shape), found.view(counts), points, how.format, block, x.dtype)


@lru_cache(maxsize=256)
def row_format(fmt: Format, affine: bool) -> ops.RowFormat | None:
    """The format as ``ops.quantize_rows`` takes it, or None if it does not."""
    codes = torch.int8 if isinstance(fmt, IntegerFormat) and fmt.signed else torch.uint8
    if fmt.bits > 8 or fmt.stretch != 1 or fmt.code_dtype != codes:
        return None
    mantissa, emin, low, high = fmt.grid
    if fmt.signed and not affine:
        low, high = max(low, -high), min(high, -low)
    nan = fmt.nan_code if isinstance(fmt, FloatFormat) else -1
    return ops.RowFormat(mantissa, emin, low, high, not fmt.subnormals, fmt.has_negative_zero, fmt.bits, nan)


def _encode_scaled(
    x: Tensor,
    how: Cast,
    block: tuple[int, ...],
    scale: Tensor,
    zero_point: Tensor | None,
    generator: torch.Generator | None,
) -> QTensor:
    fmt = how.format
    work = x if x.dtype == torch.float64 else x.float()
    scaled = work / expand_blocks(scale, tuple(x.shape), block)
    noise = _noise(scaled, how.rounding, generator)
    if zero_point is None:
        y = _round(scaled, fmt, how.rounding, "saturate", noise, symmetric=True)
    else:  # the offset is added after rounding, so that 0.0 is an integer exactly
        assert isinstance(fmt, IntegerFormat)
        offset = expand_blocks(zero_point, tuple(x.shape), block)
        y = ops.cast(scaled, 23, 23, -8.0e6, 8.0e6, how.rounding, "saturate", False, False, noise)
        y = (y + offset).clamp(fmt.low, fmt.high)
    return QTensor(_codes(y, fmt), scale, zero_point, fmt, block, x.dtype)


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise, ``10 · log10(Σ reference² / Σ (reference − approximation)²)`` in dB; ∞ if equal."""
    if reference.shape != approximation.shape:
        raise OctavoError(f"sqnr compares like with like, not {list(reference.shape)} with {list(approximation.shape)}")
    signal = reference.detach()
    if signal.dtype in (torch.bfloat16, torch.float16):
        signal = signal.float()
    noise = signal - approximation.detach()
    power, lost = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (signal, noise))
    if lost == 0 or math.isinf(lost):
        return math.inf if lost == 0 else -math.inf
    return 20 * math.log10(power / lost) if power > 0 else (math.nan if math.isnan(lost) else -math.inf)


def in_place(x: Tensor, change: Callable[[], None], straight_through: bool) -> Tensor:
    """``x`` after ``change``, which changes its numbers, with that gradient or none; torch refuses what it must."""
    if torch.is_grad_enabled() and x.requires_grad:
        if (x if x._base is None else x._base).is_leaf:  # torch would say so when it is too late
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        changed: Tensor = _InPlace.apply(x, change, straight_through)
        return changed
    change()
    return x


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[], None], straight_through: bool) -> Tensor:
        ctx.mark_dirty(x)
        ctx.straight_through = straight_through
        change()
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient if ctx.straight_through else torch.zeros_like(gradient), None, None


def _kernel_overflow(fmt: Format, overflow: OverflowPolicy) -> ops.Overflow:
    if overflow == "saturate":
        return "saturate"
    if overflow == "error":
        return "nan"
    if overflow == "nonsaturating":
        if not (fmt.has_infinity or fmt.has_nan):
            raise OctavoError(f"{fmt.name} has neither infinity nor NaN to overflow to; use 'saturate' or 'error'")
        return "inf" if fmt.has_infinity else "nan"
    raise OctavoError(f"overflow is 'saturate', 'nonsaturating' or 'error', not {overflow!r}")


def _kernel_grid(
    fmt: Format, rounding: Rounding, overflow: ops.Overflow, symmetric: bool = False
) -> tuple[int, int, float, float, Rounding, ops.Overflow, bool, bool]:
    """The format as ``ops.cast`` takes it, but for a stretch."""
    grid = fmt.grid
    low, high = grid.low, grid.high
    if symmetric and fmt.signed:
        low, high = max(low, -high), min(high, -low)
    # kernels take 2**emin for the exponent field 1; a pure scale's is 0, and one step down sets its ties to even right
    emin = grid.emin - (not fmt.zero)
    return grid.mantissa, emin, low, high, rounding, overflow, not fmt.subnormals, fmt.has_negative_zero


def _round(
    x: Tensor, fmt: Format, rounding: Rounding, overflow: ops.Overflow, noise: Tensor | None, symmetric: bool = False
) -> Tensor:
    dtype, given = x.dtype, x
    if fmt.stretch != 1:  # a fractional bias: the grid of the next lower integer bias, stretched
        x = x.double() / fmt.stretch
    y = ops.cast(x, *_kernel_grid(fmt, rounding, overflow, symmetric), noise)
    if fmt.stretch == 1:
        return y
    # dividing by the stretch may land beside the grid: what is on it already, in its own dtype, stays
    near = ops.cast(x, *_kernel_grid(fmt, "nearest-even", "saturate", symmetric), None)
    on_grid = (near * fmt.stretch).to(dtype).double() == given.double()
    return (near.where(on_grid, y) * fmt.stretch).to(dtype)


def _codes(y: Tensor, fmt: Format) -> Tensor:
    if isinstance(fmt, IntegerFormat):
        return y.nan_to_num(0.0).to(fmt.code_dtype)
    grid = fmt.grid
    if fmt.stretch != 1:  # undoing the stretch leaves a number beside the grid: back onto it
        back = (grid.mantissa, grid.emin, grid.low, grid.high, "nearest-even", "inf")
        y = ops.cast(y.double() / fmt.stretch, *back, not fmt.subnormals, fmt.has_negative_zero)
    if fmt.bits > formats.MOST_CODE_BITS:
        raise OctavoError(f"{fmt.name} has {fmt.bits} bits; codes are made for at most {formats.MOST_CODE_BITS}")
    first, infinity, nan = int(fmt.zero), fmt.infinity_code, fmt.nan_code
    return ops.encode(y, grid.mantissa, grid.emin, first, fmt.bits, fmt.signed, infinity, nan)


def _noise(x: Tensor, rounding: Rounding, generator: torch.Generator | None) -> Tensor | None:
    if rounding != "stochastic":
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.rand(x.shape, dtype=dtype, device=x.device, generator=generator)


def check_float(x: Tensor) -> None:
    """Raise ``OctavoError`` for what is no float, or holds no numbers."""
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise OctavoError(f"expected a float32, float64, bfloat16 or float16 tensor, not {x.dtype}; convert it first")
    if x.is_meta:
        raise OctavoError("the tensor is on the meta device and holds no numbers; load the weights first")


def _check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise OctavoError(f"rounding is one of {', '.join(ROUNDINGS)}, not {rounding!r}")
