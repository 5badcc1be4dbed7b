"""Simulated 8 bits: ``quantize`` followed by ``dequantize``, for measuring and training, in place if wanted.

The gradient is the straight-through one of Bengio et al. (1308.3432). What is trained, measured and served has the same
bits: where codes are not wanted, one pass leaves them out and comes to the same numbers.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo import ops
from octavo.core.cast import Cast, check_float, in_place, quantize_unchecked, row_format
from octavo.core.granularity import expand_blocks, scale_shape
from octavo.core.scaling import Current, compute_scale

LONGEST = 1 << 16  # numbers of a block that is gone over twice, for its scale and to be rounded, while it is in a cache


def fake_quantize(x: Tensor, how: Cast | None, generator: torch.Generator | None = None) -> Tensor:
    """``quantize(x).dequantize()`` in ``x``'s dtype; the gradient passes straight through. ``None`` gives ``x``."""
    if how is None:
        return x
    check_float(x)
    result: Tensor = _StraightThrough.apply(x, how, generator)
    return result


def fake_quantize_(x: Tensor, how: Cast | None, generator: torch.Generator | None = None) -> Tensor:
    """``fake_quantize`` in place, without temporaries of ``x``'s size where ``x`` is contiguous; returns ``x``.

    As with torch's own operators, a leaf that requires its gradient is changed under ``torch.no_grad()`` only.
    """
    if how is None:
        return x
    check_float(x)

    def change() -> None:
        rows = _in_rows(x, how) if x.is_contiguous() else None
        if rows is None:
            x.copy_(_simulated(x, how, generator))
        else:
            ops.fake_quantize_(x.view(rows.shape), *rows.how)

    return in_place(x, change, straight_through=True)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Cast, generator: torch.Generator | None) -> Tensor:
        return _simulated(x, how, generator)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def _simulated(x: Tensor, how: Cast, generator: torch.Generator | None) -> Tensor:
    rows = _in_rows(x, how)
    if rows is None:
        return quantize_unchecked(x, how, generator=generator).dequantize(x.dtype)
    return ops.fake_quantize(x.reshape(rows.shape), *rows.how).view(x.shape)


class _InRows(NamedTuple):
    """A tensor as a matrix, and what ``ops.fake_quantize`` is to do to it."""

    shape: tuple[int, int]
    how: tuple[int, ops.RowFormat, Tensor | None, Tensor | None, bool, bool]


def _in_rows(x: Tensor, how: Cast) -> _InRows | None:
    """Rows along which every scale serves a run of neighbours, or None where codes have to be made.

    The dimensions at the end that a block fills make up the row; if it fills none, the last one does.
    """
    numbers = row_format(how.format, how.affine) if how.rounding == "nearest-even" else None
    if numbers is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not x.numel():
        return None
    shape = tuple(x.shape)
    block = how.granularity.block(shape)
    lead = x.dim()
    while lead and block[lead - 1] == shape[lead - 1]:
        lead -= 1
    filled = lead < x.dim() or lead == 0
    lead = lead if filled else lead - 1
    k = math.prod(shape[lead:])
    m, group = x.numel() // k, k if filled else block[-1]
    source = how.scale
    power_of_two = isinstance(source, Current) and source.power_of_two
    own = isinstance(source, Current) and group <= LONGEST and all(size == 1 for size in block[:lead])
    if own:
        return _InRows((m, k), (group, numbers, None, None, how.affine, power_of_two))
    counts = scale_shape(shape, block)

    def a_row(t: Tensor) -> Tensor:
        """One of t's for every block of every row, or of one row for all."""
        columns = counts[-1] if not filled else 1
        if all(n == 1 for n in counts[:lead]):
            return t.reshape(1, columns)
        spread = expand_blocks(t, (*shape[:lead], *counts[lead:]), (*block[:lead], *(1 for _ in counts[lead:])))
        return spread.expand(*shape[:lead], *counts[lead:]).reshape(m, columns)

    scale, zeros = compute_scale(x.detach(), block, how.format, source, how.affine)
    points = None if zeros is None else a_row(zeros)
    return _InRows((m, k), (group, numbers, a_row(scale), points, how.affine, power_of_two))
