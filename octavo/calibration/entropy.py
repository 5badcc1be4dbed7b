"""The clip after which the quantized numbers tell most about the numbers: TensorRT's rule, as in NVIDIA's ModelOpt.

Migacz, "8-bit inference with TensorRT" (GTC 2017). The histogram of ``|x|`` is cut after every bin i in turn. P is what
lies below the cut, with everything beyond added to its last bin; Q is the same without the addition, its bins merged
into as many levels as the format has for magnitudes (128 for INT8), and each level spread evenly over those of its
bins that are not empty. The cut of the least divergence ``KL(P‖Q) = Σ P·log(P/Q)``, both scaled to sum to one, gives
the clip; of several equal ones the last. Zeros are so many in some layers that they would decide: bin 0 counts as much
as bin 1.

Nothing is expanded here. With prefix sums of the counts B and of the bins in use, a level's sum c and its bins n are
two differences, and ``Σ B·log Q = Σ c·log(c/n)``, for all cuts and levels at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.histogram import Histogram, HistogramObserver
from octavo.core.cast import Cast
from octavo.core.formats import IntegerFormat

FIRST_CUT = 128  # as in ModelOpt, whatever the format
EQUAL = 1e-9  # nats; divergences that differ by less differ by rounding
AT_ONCE = 1 << 20  # cuts times levels


@dataclass(eq=False)
class Entropy(HistogramObserver):
    """The clip of least Kullback-Leibler divergence, on 2048 to 4095 bins of ``|x|``.

    Integers have as many levels as numbers from 0 up. Affine ones of data with one sign have as many as numbers at all,
    256; of data with both signs half as many, and there the range ends where the data does if that is nearer. Floats
    have uneven levels: each is the bins whose middles round to the same number.
    """

    def _rule(self, seen: Histogram, how: Cast) -> tuple[Tensor, Tensor]:
        seen = seen.binned()
        low, high = seen.low.double(), seen.high.double()
        largest = torch.maximum(-low, high)
        counts, width = seen.magnitudes().unflatten(1, (-1, 2)).sum(2), 2 * seen.width
        used = (largest / width).long() + 1
        cuts = [best_cut(counts[i, : used[i]], how, bool(low[i] < 0 < high[i])) for i in range(len(low))]
        clip = (torch.tensor(cuts, device=low.device) * width).minimum(largest)
        return (torch.maximum(-clip, low), torch.minimum(clip, high)) if how.affine else (-clip, clip)


def best_cut(counts: Tensor, how: Cast, two_signs: bool = True) -> int:
    """How many of the bins of ``|x|`` lie below the clip of least divergence: counts int64 [bins]."""
    starts, offset = levels(how, two_signs)
    starts, stop = starts.to(counts.device), len(counts)
    weights = counts.double()
    weights[0] = weights[min(1, stop - 1)]
    total = weights.sum()
    widest = float(torch.cat([starts, starts.new_ones(1)]).diff().max())
    if stop <= FIRST_CUT or widest * stop <= 1 or total == 0:
        return stop  # no bin shares its level with another: clipping gains nothing
    sums, used, own = (_sums(x) for x in (weights, (weights > 0).double(), torch.xlogy(weights, weights)))
    starts = torch.cat([starts[:1], starts[starts * stop > 0.5]])  # the others end before bin 0 does
    found = []
    for cuts in torch.arange(FIRST_CUT, stop + 1, device=counts.device).split(max(1, AT_ONCE // len(starts))):
        edges = (starts * cuts[:, None] - offset).ceil().long().clamp(min=0)
        edges = torch.cat([edges, cuts[:, None]], 1)
        within = sums[edges].diff(dim=1)
        level = within / used[edges].diff(dim=1).clamp(min=1)
        inside, last = sums[cuts], weights[cuts - 1]
        beyond = total - inside
        of_last = level.gather(1, (edges[:, :-1] < cuts[:, None]).sum(1, keepdim=True) - 1).squeeze(1)
        p_log_p = own[cuts - 1] + torch.xlogy(last + beyond, last + beyond)
        p_log_q = torch.xlogy(within, level).sum(1) + torch.xlogy(beyond, of_last)
        divergence = (p_log_p - p_log_q) / total + (inside / total).log()
        found.append(divergence.where((last > 0) | (beyond == 0), torch.inf))  # Q has nothing where P has the outliers
    divergence = torch.cat(found)
    return FIRST_CUT + int((divergence <= divergence.min() + EQUAL).nonzero().max())


def levels(how: Cast, two_signs: bool) -> tuple[Tensor, float]:
    """Where the levels of a magnitude start, as fractions of the clip, and what point of a bin decides its level."""
    fmt = how.format
    if isinstance(fmt, IntegerFormat):
        number = fmt.high + 1 if not how.affine else (fmt.high - fmt.low + 1) // (1 + two_signs)
        return torch.arange(number, dtype=torch.float64) / number, 0.0
    values = fmt.values()
    values = values[values >= 0]
    return torch.cat([values[:1] * 0, (values[1:] + values[:-1]) / 2]) / fmt.max, 0.5


def _sums(x: Tensor) -> Tensor:
    """The sums of the first 0, 1, 2, … elements."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])
