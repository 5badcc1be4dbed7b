"""The average range of the tensors seen, the late ones counting most: an outlier in one batch fades.

The rule is Jacob et al.'s (1712.05877) for activations: the first tensor's ends x₀ start it, and every later one moves
it by ``v ← c·v + (1 − c)·x``. After n tensors, written out, ``v = cⁿ·x₀ + Σ (1 − c)·cⁿ⁻¹⁻ⁱ·xᵢ`` over all of them, the
first included. That form splits where the stream is cut: a part keeps its first ends, its sum and its number of
tensors, and two parts of m and n join to ``cⁿ·sumₘ + sumₙ``. So merging equals one pass, up to float64's rounding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.calibration.observer import Observer, part
from octavo.core.cast import Cast
from octavo.errors import OctavoError


def _nothing() -> Tensor:
    return torch.empty(2, 0, dtype=torch.float64)


@dataclass(eq=False)
class MovingAverage(Observer):
    """The exponential moving average of every tensor's smallest and largest number.

    ``momentum``: c above, from 0 (only the latest tensor) to just below 1 (slow).
    """

    momentum: float = 0.9
    parts = ("first", "sum", "updates")
    _first: Tensor = field(default_factory=_nothing, init=False, repr=False)  # [2, rows]: low and high
    _sum: Tensor = field(default_factory=_nothing, init=False, repr=False)
    _updates: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise OctavoError(f"a moving average has a momentum from 0 to below 1, not {self.momentum}")

    def _see(self, low: Tensor, high: Tensor, numbers: Callable[[], Tensor]) -> None:
        x = torch.stack([low, high]).double()
        if self.count == 0:
            self._first, self._sum = x, torch.zeros_like(x)
        self._sum = self.momentum * self._sum + (1 - self.momentum) * x.to(self._sum)
        self._updates += 1

    def _join(self, later: Observer) -> None:
        assert isinstance(later, MovingAverage)
        self._sum = self.momentum**later._updates * self._sum + later._sum.to(self._sum)
        self._updates += later._updates

    def _range(self, how: Cast) -> tuple[Tensor, Tensor]:
        low, high = self._sum + self.momentum**self._updates * self._first
        return low, high

    def _state(self) -> dict[str, Tensor]:
        return {"first": self._first, "sum": self._sum, "updates": torch.tensor(self._updates)}

    def _restore(self, state: Mapping[str, Tensor], count: int) -> None:
        first, total = (part(state, name, torch.float64, 2, count) for name in ("first", "sum"))
        updates = int(part(state, "updates", torch.int64))
        if updates < 1 or bool((first[0] > first[1]).any() or (total[0] > total[1]).any()):
            raise OctavoError("the state has a range whose lower end is above the upper, or is of no tensors at all")
        self._first, self._sum, self._updates = first, total, updates
