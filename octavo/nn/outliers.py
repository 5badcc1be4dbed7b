"""LLM.int8() (2208.07339): a few input columns are so large that they would decide the scale of every row.

Columns of the input in which any magnitude exceeds the threshold are taken out and multiplied in the input's own dtype;
the rest is quantized without them, so its scales are those of ordinary numbers. Both products are added in FP32, with
the bias, and rounded once.

The weight stays whole in its 8 bits. Which columns are outliers is known only once the input is there, so the weight's
scales span all its columns, and the columns that are taken out are multiplied with what their codes stand for. (So does
bitsandbytes once a model is loaded; the paper multiplies with the 16-bit weight, which would have to be kept.)

NaN is no outlier: it makes its row NaN, as in any 8-bit layer. An infinity is one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.core.formats import FloatFormat
from octavo.core.qtensor import QTensor
from octavo.ops.outliers import add_columns, column_peaks


def may_hold(x: Tensor, threshold: float) -> bool:
    """Whether any magnitude in ``x`` exceeds the threshold; true as well where there are no numbers to look at yet."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
        return True
    if x.numel() == 0:
        return False
    low, high = torch.aminmax(x.detach())  # the fastest pass there is; both are NaN where anything is
    return not (float(high) <= threshold and float(low) >= -threshold)


def multiply_apart(x: Tensor, threshold: float, weight: QTensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """``x @ Wᵀ + b`` of ``x`` […, in] with its outliers taken out, […, out] in ``x``'s dtype.

    ``multiply`` does so without outliers, in its argument's dtype.
    """
    rows = x.detach().reshape(-1, weight.shape[1])
    peaks = column_peaks(rows)
    wide = rows if x.dtype == torch.float64 else rows.float()
    sums = multiply(torch.where(peaks > threshold, 0.0, wide)).float()
    fmt, codes, scale, zeros = weight.format, weight.codes, weight.scale, weight.zero_point
    table = fmt.table_in(torch.float32, weight.device) if isinstance(fmt, FloatFormat) else None
    y = add_columns(sums, rows, peaks, threshold, codes, table, scale, zeros, weight.block, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
