"""LLM.int8() (2208.07339): a few input columns are so large that they would decide the scale of every row.

Columns of the input in which any magnitude exceeds the threshold are taken out and multiplied in the input's own dtype;
the rest is quantized without them, so its scales are those of ordinary numbers. Both products are added in FP32, with
the bias, and rounded once.

The weight stays whole in its 8 bits. Which columns are outliers is known only once the input is there, so the weight's
scales span all its columns, and the columns that are taken out are multiplied with what their codes stand for. (So does
bitsandbytes once a model is loaded; the paper multiplies with the 16-bit weight, which would have to be kept.)

NaN is no outlier: it makes its row NaN, as in any 8-bit layer. An infinity is one.
"""

import torch
from torch import Tensor

from octavo.core.formats import FloatFormat
from octavo.core.matmul import multiply
from octavo.nn.layer import QuantizedLayer
from octavo.ops.outliers import add_columns, column_peaks


def may_hold(x: Tensor, threshold: float) -> bool:
    """Whether any magnitude in ``x`` exceeds the threshold; true as well where there are no numbers to look at yet."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
        return True
    if x.numel() == 0:
        return False
    low, high = torch.aminmax(x)  # the fastest pass there is; both are NaN where anything is
    return not (float(high) <= threshold and float(low) >= -threshold)


def multiply_apart(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """``x @ Wᵀ + b`` of ``x`` [M, in] with its outliers taken out, [M, out] in ``x``'s dtype."""
    threshold, weight = layer.scheme.outliers, layer.quantized_weight
    assert threshold is not None
    x = x.detach()
    peaks = column_peaks(x)
    rest = torch.where(peaks > threshold, 0.0, x)
    sums = multiply(layer.quantize_input(rest), weight, layer.bias, torch.float32)
    fmt = weight.format
    table = fmt.table_in(torch.float32, weight.device) if isinstance(fmt, FloatFormat) else None
    codes, scale, zeros = weight.codes, weight.scale, weight.zero_point
    return add_columns(sums, x, peaks, threshold, codes, table, scale, zeros, weight.block, x.dtype)
