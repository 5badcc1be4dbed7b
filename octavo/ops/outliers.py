"""What LLM.int8() (2208.07339) needs beside a quantized product: which columns are large, and their own product.

How many columns are taken out depends on the numbers, but no result's shape does: under ``torch.compile`` and
``torch.export`` these are two nodes of a whole graph.
"""

import torch
from torch import Tensor

from octavo.ops.schema import LIBRARY

LIBRARY.define("column_peaks(Tensor x) -> Tensor")
LIBRARY.define(
    "add_columns(Tensor sums, Tensor x, Tensor peaks, float threshold, Tensor codes, Tensor? table, Tensor scale, "
    "Tensor? zeros, int rows, int cols, ScalarType dtype) -> Tensor"
)


@torch.library.register_fake("octavo::column_peaks")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.register_fake("octavo::add_columns")
def _(
    sums: Tensor,
    x: Tensor,
    peaks: Tensor,
    threshold: float,
    codes: Tensor,
    table: Tensor | None,
    scale: Tensor,
    zeros: Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(sums.shape, dtype=dtype, device=sums.device)


def column_peaks(x: Tensor) -> Tensor:
    """The largest magnitude in every column of ``x`` [M, K], float32 [K]; 0 where there is none, NaN counts as 0."""
    result: Tensor = torch.ops.octavo.column_peaks(x)
    return result


def add_columns(
    sums: Tensor,
    x: Tensor,
    peaks: Tensor,
    threshold: float,
    codes: Tensor,
    table: Tensor | None,
    scale: Tensor,
    zeros: Tensor | None,
    block: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """``sums + x[:, taken] @ W[:, taken].T`` in ``dtype``, where ``taken`` are the columns of ``peaks`` > threshold.

    ``sums`` [M, N] is float32, ``x`` [M, K]. W [N, K] is ``table[codes]``, or ``codes − zeros``, times the float32
    ``scale`` of each ``block``, rounded to ``x``'s dtype (float64: to float32). Products are added in FP32 as by
    ``float_mm``; then one rounding to float32, of the sum with ``sums``, and one to ``dtype``.
    """
    result: Tensor = torch.ops.octavo.add_columns(
        sums, x, peaks, threshold, codes, table, scale, zeros, block[0], block[1], dtype
    )
    return result


def _column_peaks(x: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros(x.shape[1], dtype=torch.float32)
    return x.abs().nan_to_num(0.0, torch.inf).amax(0).float()


def _add_columns(
    sums: Tensor,
    x: Tensor,
    peaks: Tensor,
    threshold: float,
    codes: Tensor,
    table: Tensor | None,
    scale: Tensor,
    zeros: Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    taken = (peaks > threshold).nonzero().squeeze(1)
    if not taken.numel():
        return sums.to(dtype, copy=True)
    few, n, places = codes.index_select(1, taken), codes.shape[0], taken // max(cols, 1)

    def under(t: Tensor) -> Tensor:
        """One value a block as one for each of the columns, and for each row or all."""
        t = t.index_select(1, places) if t.shape[1] > 1 else t
        return t.repeat_interleave(rows, 0)[:n] if t.shape[0] > 1 and rows > 1 else t

    if table is not None:
        numbers = torch.ops.octavo.decode(few, table)
    else:
        numbers = few.float() if zeros is None else (few.int() - under(zeros)).float()
    # a scale that was rounded up may carry the largest code past the dtype's end
    most = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)
    weight = (numbers * under(scale)).clamp_(-most, most).to(x.dtype)
    apart: Tensor = torch.ops.octavo.float_mm(x.index_select(1, taken), weight)
    return apart.add_(sums).to(dtype)


LIBRARY.impl("column_peaks", _column_peaks, "CompositeExplicitAutograd")
LIBRARY.impl("add_columns", _add_columns, "CompositeExplicitAutograd")
