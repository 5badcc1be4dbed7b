"""The range whose quantization loses least: the mean squared error, with the format's own rounding, on the histogram.

Clipping trades a few large errors for many small ones. For each candidate range the histogram's points are quantized
just as the tensors will be, and their errors are weighed by how many numbers each stands for. The candidates lie on a
geometric grid, since tails may reach a thousand times farther than the best clip; then closer and closer around the
best, since for floats the error is bumpy and no bracket could be trusted.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.calibration.histogram import Histogram, HistogramObserver
from octavo.core.cast import Cast, quantize_scaled
from octavo.core.formats import FLOAT32_MAX
from octavo.core.granularity import PerToken
from octavo.core.scaling import Constant, scale_of_range

AN_OCTAVE = 16  # candidates
BEYOND = 4  # candidates above the largest magnitude: floats may gain from them
SPANS = (1 / AN_OCTAVE, 1 / 128)  # octaves to either side of the best so far, searched in turn
WIDE_SPANS = (1.0, 1 / 4, *SPANS)
AROUND = 17  # candidates in each span
AT_ONCE = 1 << 21  # numbers quantized at a time


@dataclass(eq=False)
class MSE(HistogramObserver):
    """The range of least mean squared error for the Cast's format, symmetric or with each end where it is best.

    Stochastic rounding is taken for rounding to nearest.
    """

    def _rule(self, seen: Histogram, how: Cast) -> tuple[Tensor, Tensor]:
        values, counts, unit = seen.points()
        low, high = (end.double() / unit for end in (seen.low, seen.high))
        largest = torch.maximum(-low, high)
        search = _Search(values, counts, how)
        # no clip below a quarter of the root mean square can be best: it would lose most of the power
        power = (values.double().square() * counts).sum(1) / counts.sum(1)
        least = power.sqrt() / 4
        octaves = float((largest / least).nan_to_num(1.0).log2().max())  # all zeros: 0/0
        down = torch.arange(-BEYOND, math.ceil(AN_OCTAVE * octaves) + 1, device=low.device)[:, None]
        clips = torch.maximum(largest * 2 ** (-down.double() / AN_OCTAVE), least)
        if not how.affine:
            clip = search.best(-clips, clips)[1]
            for span in SPANS:
                clips = clip * _around(span, clip)
                clip = search.best(-clips, clips)[1]
            low, high = -clip, clip
        else:
            first, last = low.clamp(max=0), high.clamp(min=0)
            low, high = search.best(torch.maximum(-clips, first), torch.minimum(clips, last))
            for span in WIDE_SPANS:
                ends = torch.minimum(high * _around(span, high), last)
                low, high = search.best(low.expand_as(ends), ends)
                ends = torch.maximum(low * _around(span, low), first)
                low, high = search.best(ends, high.expand_as(ends))
        low, high = ((end * unit).clamp(-FLOAT32_MAX, FLOAT32_MAX) for end in (low, high))
        return low, high


class _Search:
    """Compares ranges by what they lose of weighted points."""

    def __init__(self, values: Tensor, counts: Tensor, how: Cast) -> None:
        self.values, self.counts, self.how = values, counts, how

    def best(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Of candidates [n, rows], each row's best, [rows]; of equals the first."""
        which = squared_error(self.values, self.counts, low, high, self.how).argmin(0, keepdim=True)
        return low.gather(0, which).squeeze(0), high.gather(0, which).squeeze(0)


def squared_error(values: Tensor, counts: Tensor, low: Tensor, high: Tensor, how: Cast) -> Tensor:
    """What n candidate ranges for each row lose: ``Σ counts · (quantized − value)²``, float64 [n, rows].

    values float32 and counts float64 [rows, points]; low and high [n, rows].
    """
    power_of_two = not isinstance(how.scale, Constant) and how.scale.power_of_two
    scale, zero_point = scale_of_range(low, high, how.format, how.affine, power_of_two)
    rounding = "nearest-even" if how.rounding == "stochastic" else how.rounding
    rows = replace(how, granularity=PerToken(), rounding=rounding)
    found, size = [], max(1, AT_ONCE // values.numel())
    for i in range(0, len(scale), size):
        some = slice(i, i + size)
        x = values.expand(len(scale[some]), -1, -1)
        zeros = None if zero_point is None else zero_point[some, :, None]
        lost = quantize_scaled(x, rows, scale[some, :, None], zeros).dequantize() - x
        found.append((lost.square() * counts).sum(2))
    return torch.cat(found)


def _around(span: float, like: Tensor) -> Tensor:
    """Factors from ``2**-span`` to ``2**span``, [AROUND, 1]; 1 is the middle one."""
    return 2 ** torch.linspace(-span, span, AROUND, dtype=torch.float64, device=like.device)[:, None]
