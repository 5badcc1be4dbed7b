"""A quantized tensor: a plain record of codes and scales, ``x ≈ (codes − zero_point) · scale``."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo import ops
from octavo.core.formats import FloatFormat, Format
from octavo.core.granularity import expand_blocks


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes with the scales that make them numbers.

    ``codes``: any shape, integers of ``format.code_dtype``. ``scale``: float32 of the same rank, one element a block.
    ``zero_point``: int32 of the scale's shape, or None where it is 0. ``block``: the size of a block along each
    dimension; the scale's shape tells it except at ragged edges. ``dtype``: what the tensor was before.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: Format
    block: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points; a code takes whole bytes."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero_point) if t is not None)

    @property
    def mT(self) -> "QTensor":
        """The last two dimensions swapped, scales and all; no copy."""
        turned = None if self.zero_point is None else self.zero_point.mT
        block = (*self.block[:-2], self.block[-1], self.block[-2])
        return replace(self, codes=self.codes.mT, scale=self.scale.mT, zero_point=turned, block=block)

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``codes − zero_point`` as numbers, unscaled; exact in bfloat16 for formats of at most 8 bits."""
        if isinstance(self.format, FloatFormat):
            return ops.decode(self.codes, self.format.table_in(dtype, self.codes.device))
        if self.zero_point is None:
            return self.codes.to(dtype)
        return (self.codes.int() - expand_blocks(self.zero_point, tuple(self.shape), self.block)).to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers again, computed in float32 (float64 if asked for) and rounded once to ``dtype``."""
        dtype = dtype or self.dtype
        work = torch.float64 if dtype == torch.float64 else torch.float32
        scale = expand_blocks(self.scale, tuple(self.shape), self.block)
        product = self.numbers(work) * scale
        if dtype == torch.float64:
            return product
        most = torch.finfo(dtype).max  # a scale that was rounded up may carry the largest code past the dtype's end
        return product.clamp(-most, most).where(scale.isfinite(), product).to(dtype)
