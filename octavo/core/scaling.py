"""Where a tensor's scale comes from: its own largest value, a calibration that went before, or a constant.

Everywhere ``x ≈ (codes − zero_point) · scale``: the scale multiplies on the way out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo import ops
from octavo.core.formats import FloatFormat, Format
from octavo.core.granularity import reduce_blocks
from octavo.errors import OctavoError

LEAST_AMAX = 1e-12  # a block of zeros still needs a scale that is not zero


@dataclass(frozen=True)
class Current:
    """Just-in-time: the scale that takes this tensor's largest magnitude to the format's largest number.

    ``power_of_two`` rounds it up to a power of two, as the E8M0 scales of DeepSeek-V3.1 and the MX formats are.
    """

    power_of_two: bool = False


@dataclass(frozen=True)
class Static:
    """Found beforehand, by calibration on example data, and kept with the layer: the same for every tensor to come.

    ``power_of_two`` as for ``Current``.
    """

    power_of_two: bool = False


@dataclass(frozen=True)
class Constant:
    """The same scale for every block, whatever the data: 1.0 is a plain cast."""

    value: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.value < float("inf")):
            raise OctavoError(f"a constant scale must be positive and finite, not {self.value}")


Scale = Current | Static | Constant


def compute_scale(
    x: Tensor,
    block: tuple[int, ...],
    fmt: Format,
    source: Scale,
    affine: bool,
    storage: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """The scale (and, if ``affine``, the zero point) of every block of ``x``, from ``x`` itself.

    A block with NaN or an infinity gets NaN for a scale: its values cannot pass as numbers. ``storage``: see
    ``scale_of_range``. Raises ``OctavoError`` for a ``Static`` source, which needs a calibration.
    """
    if isinstance(source, Static):
        raise OctavoError(
            "a static scale comes from calibration, not from the tensor itself: pass data to quantize_, or take a "
            "scale from an observer and call quantize_scaled"
        )
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high = (edge.to(work) for edge in reduce_blocks(x, block))
    if isinstance(source, Constant):
        whole = low.isfinite() & high.isfinite()
        scale = _store(torch.full_like(low, source.value), False, storage)
        return scale.where(whole, math.nan), torch.zeros_like(scale, dtype=torch.int32) if affine else None
    return scale_of_range(low, high, fmt, affine, source.power_of_two, storage)


def scale_of_range(
    low: Tensor,
    high: Tensor,
    fmt: Format,
    affine: bool = False,
    power_of_two: bool = False,
    storage: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """The scales (and, if ``affine``, the zero points) for ranges ``low … high`` of any one shape.

    Symmetric: ``scale = amax / max``. Affine (Jacob et al., 1712.05877): the range, stretched to hold 0, is
    spread over all integers, and the zero point is the integer that stands for 0.0 exactly. ``storage`` is the dtype
    the scale will be kept in: it is rounded to that dtype *now*, so that the codes fit the scale a loader reads back.
    A range that is not finite gets NaN for a scale.
    """
    whole = low.isfinite() & high.isfinite()
    if not affine:
        amax = torch.maximum(-low, high) if fmt.signed else high
        most = min(fmt.max, -fmt.min) if fmt.signed else fmt.max
        scale = _store(amax.where(amax > 0, LEAST_AMAX) / most, power_of_two, storage)
        return scale.where(whole, math.nan), None
    if isinstance(fmt, FloatFormat):
        raise OctavoError(f"a zero point needs an integer format, {fmt.name} is a float; use affine=False")
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = fmt.high - fmt.low
    spread = high - low
    scale = spread.where(spread > 0, LEAST_AMAX) / steps
    scale = scale.where(scale.isfinite(), high / steps - low / steps)  # a range wider than the largest number
    scale = _store(scale, power_of_two, storage).where(whole, math.nan)
    zero_point = (fmt.low - (low / scale).round()).nan_to_num(0.0).clamp(fmt.low, fmt.high)
    return scale, zero_point.to(torch.int32)


def _store(scale: Tensor, power_of_two: bool, storage: torch.dtype) -> Tensor:
    """The scale in float32 with a value that ``storage`` holds: the nearest, but never zero or infinity."""
    if power_of_two:
        ends = torch.finfo(torch.float32)  # what underflowed to zero has no exponent, nor has infinity
        mantissa, exponent = torch.frexp(scale.clamp(ends.tiny, ends.max))  # mantissa · 2**exponent, ½ ≤ mantissa < 1
        up = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scale = ops.reference.pow2(up.clamp(-149, 127)).to(scale.dtype)
    limits = torch.finfo(torch.float32 if storage == torch.float64 else storage)
    if limits.bits == 32:
        return scale.clamp(limits.tiny, limits.max).float()
    least = limits.tiny * limits.eps  # float16's subnormals are within reach: there upwards, so that no code saturates
    scale = torch.where(scale < limits.tiny, (scale / least).ceil() * least, scale.clamp(max=limits.max))
    return scale.to(storage).float()
