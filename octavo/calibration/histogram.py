"""A histogram that grows with its data and does not mind in which order, or in which parts, the data comes.

Bins are a power of two wide and begin at multiples of their width. When a number falls beyond the last bin, the width
doubles: neighbours become one bin, and the counts are exactly those that the wider bins would have had from the start.
The width follows from the largest magnitude alone, so the whole is a function of the set of numbers seen: merging two
histograms equals one pass bit for bit, however the data was split. (Of a histogram whose first batch sets its bins,
as in TensorRT's, that cannot be said.)

A bin is known by sign and magnitude: number ±i holds ``i ≤ |x|/width < i + 1``, number 0 both signs. So the counts of
x and of |x| are both exact, and at the end 4096 to 8191 bins of |x| are in use.

Of few numbers a histogram would be larger than they are: up to ``HELD`` of them a row are simply kept.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.calibration.observer import Observer, ends, part
from octavo.core.cast import Cast
from octavo.errors import OctavoError
from octavo.ops.reference import pow2

LOG_BINS = 13
BINS = 1 << LOG_BINS  # of |x|; with both signs, of which 0 is one, 2 · BINS − 1
HELD = 2 * BINS  # numbers a row that are kept as they are
LEAST_EXPONENT = -149  # of a width: that of float32's smallest number
CHUNK = 1 << 18  # numbers counted at a time, so that their bins' numbers stay in the cache
AT_ONCE = 1 << 21  # elements of a part


@dataclass(eq=False)
class Histogram:
    """What one or more rows of numbers are like.

    ``low``, ``high``: the exact ends, float32 [rows]. ``counts``: int64 [rows, 2·BINS − 1], from the most negative bin
    up, or [rows, 0] as long as all numbers are held. Bins are ``2**exponent`` wide, int32 [rows]. ``held``: float32
    [rows, any], numbers not in ``counts``, with NaN where a row has fewer.

    No tensor is ever written to once it is here, so that copies can share them.
    """

    low: Tensor
    high: Tensor
    exponent: Tensor
    counts: Tensor
    held: Tensor

    @staticmethod
    def empty(rows: int, device: torch.device | None = None) -> "Histogram":
        """Of nothing yet."""
        return Histogram(
            low=torch.full((rows,), torch.inf, device=device),
            high=torch.full((rows,), -torch.inf, device=device),
            exponent=torch.full((rows,), LEAST_EXPONENT, dtype=torch.int32, device=device),
            counts=torch.zeros(rows, 0, dtype=torch.int64, device=device),
            held=torch.empty(rows, 0, device=device),
        )

    def add(self, low: Tensor, high: Tensor, numbers: Tensor) -> None:
        """Take in rows of finite ``numbers``, [rows, any], whose smallest are ``low`` and largest ``high``."""
        device = self.low.device
        self.low, self.high = torch.minimum(self.low, low.to(device)), torch.maximum(self.high, high.to(device))
        if self.held.shape[1] + numbers.shape[1] <= HELD:
            self.held = torch.cat([self.held, numbers.to(device, torch.float32)], 1)
        else:
            self._count(self.held, numbers.to(device))

    def merge(self, later: "Histogram") -> None:
        """Take in all that another has seen of the same rows."""
        self.add(later.low, later.high, later.held)
        if later.counts.shape[1]:
            device = self.low.device
            self._count(self.held)  # which widens the bins as far as needed
            self.counts = self.counts + _widened(later.counts.to(device), self.exponent - later.exponent.to(device))

    def _count(self, *numbers: Tensor) -> None:
        exponent = _exponent(self.low, self.high)
        counts = _widened(self.counts, exponent - self.exponent)
        if counts.shape[1] == 0:
            counts = counts.new_zeros(len(counts), 2 * BINS - 1)
        for x in numbers:
            counts = counts + _count(x, exponent)
        self.counts, self.exponent, self.held = counts, exponent, self.held[:, :0]

    def binned(self) -> "Histogram":
        """The same with every number in a bin and none held."""
        if self.counts.shape[1] and not self.held.shape[1]:
            return self
        same = replace(self)
        same._count(self.held)
        return same

    @property
    def width(self) -> Tensor:
        """The width of every row's bins, float64 [rows]."""
        return pow2(self.binned().exponent)

    def magnitudes(self) -> Tensor:
        """How many numbers have their magnitude in each bin from 0 up, int64 [rows, BINS]."""
        return _by_sign(self.binned().counts).sum(1)

    def edges(self) -> Tensor:
        """Where each of the bins ends and the next begins, float64 [rows, 2·BINS]; number 0 has both signs."""
        number = torch.arange(1, BINS + 1, dtype=torch.float64, device=self.low.device)
        return torch.cat([-number.flip(0), number]) * self.width[:, None]

    def points(self) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers as few: their values, how many there are of each, and the values' unit.

        ``values · unit`` are the numbers themselves as long as they are held, and then the middles of the bins: float32
        and float64 [rows, any], ascending. The unit is the least power of two above all magnitudes, float64 [rows].
        """
        unit = pow2(_exponent(self.low, self.high) + LOG_BINS)
        if self.counts.shape[1] == 0:
            values = self.held.sort(1).values / unit[:, None]
            return values.nan_to_num(0.0).float(), (~values.isnan()).double(), unit
        counts = self.binned().counts
        number = torch.arange(1 - BINS, BINS, device=counts.device)
        middle = (number + 0.5 * number.sign()) / BINS
        used = (counts > 0).any(0)
        return middle[used].expand(len(counts), -1), counts[:, used].double(), unit

    def share_outside(self, low: Tensor, high: Tensor) -> Tensor:
        """The share of the numbers below ``low`` or above ``high``, both [rows]; float64 [rows].

        Within a bin numbers count as spread evenly, except that none are beyond the exact ends.
        """
        seen = self.binned()
        counts, edges = seen.counts.double(), seen.edges()
        left = torch.maximum(edges[:, :-1], self.low.double()[:, None])
        right = torch.minimum(edges[:, 1:], self.high.double()[:, None])
        inside = torch.minimum(right, high.double()[:, None]) - torch.maximum(left, low.double()[:, None])
        share = (inside / (right - left)).clamp(0, 1)
        share = share.where(right > left, (inside >= 0).double())  # all of them are one number
        return ((1 - share) * counts).sum(1) / counts.sum(1)

    def parts(self) -> Iterator["Histogram"]:
        """The rows, a few at a time, so that what is made of each part stays small."""
        size = max(1, AT_ONCE // (2 * BINS))
        for i in range(0, len(self.low), size):
            yield Histogram(*(x[i : i + size] for x in (self.low, self.high, self.exponent, self.counts, self.held)))

    def state(self) -> dict[str, Tensor]:
        """Everything, as a function of the numbers alone and not of their order."""
        ends = {"low": self.low, "high": self.high}
        if self.counts.shape[1] == 0:
            return {**ends, "counts": self.counts, "held": self.held.sort(1).values + 0.0}  # −0 becomes 0
        return {**ends, "counts": self.binned().counts, "held": self.held[:, :0]}


@dataclass(eq=False)
class HistogramObserver(Observer):
    """An observer whose rule works on a histogram; those below differ in the rule alone, and can ``adopt``."""

    parts = ("low", "high", "counts", "held")
    #: What was seen. Each row of it belongs to a range.
    histogram: Histogram = field(default_factory=lambda: Histogram.empty(0), init=False, repr=False)

    def _see(self, low: Tensor, high: Tensor, numbers: Callable[[], Tensor]) -> None:
        if self.count == 0:
            self.histogram = Histogram.empty(len(low), low.device)
        self.histogram.add(low, high, numbers())

    def _join(self, later: Observer) -> None:
        assert isinstance(later, HistogramObserver)
        self.histogram.merge(later.histogram)

    def _range(self, how: Cast) -> tuple[Tensor, Tensor]:
        lows, highs = zip(*(self._rule(rows, how) for rows in self.histogram.parts()), strict=True)
        return torch.cat(lows), torch.cat(highs)

    @abstractmethod
    def _rule(self, seen: Histogram, how: Cast) -> tuple[Tensor, Tensor]:
        """Both ends for some of the rows, [rows]."""

    def _state(self) -> dict[str, Tensor]:
        return self.histogram.state()

    def _restore(self, state: Mapping[str, Tensor], count: int) -> None:
        low, high = ends(state, count)
        counts = part(state, "counts", torch.int64, count, None)
        held = state.get("held", torch.empty(0))
        part({"held": held.nan_to_num(0.0)}, "held", torch.float32, count, None)
        binned = counts.shape[1] > 0
        wrong = counts.shape[1] != 2 * BINS - 1 or held.shape[1] if binned else held.shape[1] > HELD
        numbers = counts.sum(1) if binned else (~held.isnan()).sum(1)
        outside = (held < low[:, None]) | (held > high[:, None])
        if wrong or bool((counts < 0).any() or (numbers == 0).any() or outside.any()):
            raise OctavoError(f"the state is no histogram of Octavo's: {list(counts.shape)} and {list(held.shape)}")
        exponent = _exponent(low, high) if binned else torch.full_like(low, LEAST_EXPONENT, dtype=torch.int32)
        self.histogram = Histogram(low, high, exponent, counts, held.detach())


def _exponent(low: Tensor, high: Tensor) -> Tensor:
    """The exponent of the width with which the larger magnitude falls into one of the upper half of the bins, int32."""
    largest = torch.maximum(-low, high).double()
    exponent = (torch.frexp(largest)[1] - LOG_BINS).clamp(min=LEAST_EXPONENT)
    return exponent.where(largest > 0, LEAST_EXPONENT).int()


def _count(numbers: Tensor, exponent: Tensor) -> Tensor:
    """How many of each row's numbers are in each bin, int64 [rows, 2·BINS − 1]; NaN is in none."""
    (rows, length), device = numbers.shape, numbers.device
    counts = torch.zeros(rows, 2 * BINS, dtype=torch.int64, device=device)  # the last for NaN
    # what was held may have NaN anywhere; longer rows come straight from a tensor, with their padding at the end
    ragged = bool((numbers if length <= HELD else numbers[:, -1]).isnan().any())
    size = max(1, CHUNK // max(length, 1))
    for i in range(0, rows, size):
        some = slice(i, min(i + size, rows))
        first = torch.arange(BINS - 1, 2 * BINS * (some.stop - i), 2 * BINS, dtype=torch.int32, device=device)[:, None]
        for x in numbers[some].split(CHUNK, 1) if length else ():
            number = _in_widths(x, exponent[some]).to(torch.int32)  # toward zero
            if ragged:
                number = number.where(~x.isnan(), BINS)
            index = number.add_(first).view(-1)
            counts[some] += torch.bincount(index, minlength=2 * BINS * (some.stop - i)).view(-1, 2 * BINS)
    return counts[:, :-1]


def _in_widths(x: Tensor, exponent: Tensor) -> Tensor:
    """``x / 2**exponent`` in float32, exactly, or nearer to 0 than 1 where x is."""
    first = (-exponent).clamp(max=127)  # float32 holds no greater power of two
    y = x.float() * pow2(first).float()[:, None]
    rest = -exponent - first
    return y * pow2(rest).float()[:, None] if bool(rest.any()) else y


def _by_sign(counts: Tensor) -> Tensor:
    """The counts by sign, positive first, and magnitude, [rows, 2, BINS]; number 0 counts as positive."""
    return torch.stack([counts[:, BINS - 1 :], F.pad(counts[:, : BINS - 1].flip(1), (1, 0))], 1)


def _widened(counts: Tensor, shift: Tensor) -> Tensor:
    """The counts in bins ``2**shift`` times as wide; shift ≥ 0, int32 [rows]."""
    if counts.shape[1] == 0 or not bool(shift.any()):
        return counts
    counts = counts.clone()
    for k in shift.unique().tolist():
        if k == 0:
            continue
        which = shift == k
        size = 1 << min(k, LOG_BINS)
        folded = _by_sign(counts[which]).unflatten(2, (-1, size)).sum(3)
        positive, negative = F.pad(folded, (0, BINS - BINS // size)).unbind(1)
        positive[:, 0] += negative[:, 0]
        counts[which] = torch.cat([negative[:, 1:].flip(1), positive], 1)
    return counts
