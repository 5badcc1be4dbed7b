"""The range of all that was seen: nothing is clipped, and one outlier decides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from octavo.calibration.observer import Observer, ends
from octavo.core.cast import Cast


@dataclass(eq=False)
class MinMax(Observer):
    """From the smallest to the largest number seen."""

    parts: ClassVar[tuple[str, ...]] = ("low", "high")
    _low: Tensor = field(default_factory=lambda: torch.empty(0), init=False, repr=False)
    _high: Tensor = field(default_factory=lambda: torch.empty(0), init=False, repr=False)

    def _see(self, low: Tensor, high: Tensor, numbers: Callable[[], Tensor]) -> None:
        if self.count:
            low, high = torch.minimum(self._low, low.to(self._low)), torch.maximum(self._high, high.to(self._high))
        self._low, self._high = low, high

    def _join(self, later: Observer) -> None:
        assert isinstance(later, MinMax)
        self._see(later._low, later._high, lambda: later._low)

    def _range(self, how: Cast) -> tuple[Tensor, Tensor]:
        return self._low, self._high

    def _state(self) -> dict[str, Tensor]:
        return {"low": self._low, "high": self._high}

    def _restore(self, state: Mapping[str, Tensor], count: int) -> None:
        self._low, self._high = ends(state, count)
