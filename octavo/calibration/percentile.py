"""The range that holds all but a small share of the numbers: outliers are clipped, however far out they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.histogram import Histogram, HistogramObserver
from octavo.core.cast import Cast
from octavo.errors import OctavoError


@dataclass(eq=False)
class Percentile(HistogramObserver):
    """Between the ends lie ``percent`` of the numbers; 100 is min/max.

    Symmetric Casts clip at that percentile of the magnitude, affine ones cut half of the rest off at either end. Within
    a bin numbers count as spread evenly, so what is not all zero never has the range 0.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.percent <= 100:
            raise OctavoError(f"a percentile is above 0 and at most 100, not {self.percent}")

    def _rule(self, seen: Histogram, how: Cast) -> tuple[Tensor, Tensor]:
        seen = seen.binned()
        low, high, share = seen.low.double(), seen.high.double(), self.percent / 100
        if how.affine:
            counts, edges, tail = seen.counts, seen.edges(), (1 - share) / 2
            return quantile(counts, edges, tail).clamp(low, high), quantile(counts, edges, 1 - tail).clamp(low, high)
        magnitudes = seen.magnitudes()
        edges = torch.arange(magnitudes.shape[1] + 1, device=low.device) * seen.width[:, None]
        clip = quantile(magnitudes, edges, share).minimum(torch.maximum(-low, high))
        return -clip, clip


def quantile(counts: Tensor, edges: Tensor, share: float) -> Tensor:
    """Where ``share`` of the counted numbers lie below, [rows]: counts [rows, bins] and edges [rows, bins + 1]."""
    below = counts.cumsum(1)
    target = share * below[:, -1:].double()
    place = (below < target).sum(1, keepdim=True).clamp(max=counts.shape[1] - 1)
    within, left, right = counts.gather(1, place), edges.gather(1, place), edges.gather(1, place + 1)
    part = (target - (below.gather(1, place) - within)) / within.clamp(min=1)
    return (left + part.clamp(0, 1) * (right - left)).squeeze(1)
