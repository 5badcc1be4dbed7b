"""A range, and some of the numbers behind it: enough to try on real data what a choice costs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from octavo.calibration.minmax import MinMax
from octavo.calibration.observer import Observer, part
from octavo.errors import OctavoError


@dataclass(eq=False)
class Sample(MinMax):
    """``MinMax`` that keeps up to ``keep`` numbers of every row: each of so many, all rows the same ones.

    For inputs of layers and ``PerChannel(-1)`` a row is a channel, and what is kept are whole tokens.
    """

    keep: int = 256

    parts: ClassVar[tuple[str, ...]] = (*MinMax.parts, "kept", "stride")
    kept: Tensor = field(default_factory=lambda: torch.empty(0, 0), init=False, repr=False)  # float32 [rows, kept]
    _stride: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 1:
            raise OctavoError(f"a sample keeps at least one number of each row, not {self.keep}")

    def _see(self, low: Tensor, high: Tensor, numbers: Callable[[], Tensor]) -> None:
        x = numbers()
        stride = math.ceil(x.shape[1] / self.keep)
        self._add(x[:, ::stride].to(torch.float32, copy=True), stride)
        super()._see(low, high, numbers)

    def _join(self, later: Observer) -> None:
        assert isinstance(later, Sample)
        self._add(later.kept, later._stride)
        super()._see(later._low, later._high, lambda: later.kept)

    def _add(self, kept: Tensor, stride: int) -> None:
        """Keep these too, and so many of all that they fit."""
        if self.count:
            common = max(stride, self._stride)
            mine, theirs = self.kept[:, :: common // self._stride], kept[:, :: common // stride]
            kept, stride = torch.cat((mine, theirs.to(mine)), dim=1), common
            more = math.ceil(kept.shape[1] / self.keep)
            kept, stride = kept[:, ::more].clone(), stride * more
        self.kept, self._stride = kept, stride

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "kept": self.kept, "stride": torch.tensor(self._stride)}

    def _restore(self, state: Mapping[str, Tensor], count: int) -> None:
        kept, stride = part(state, "kept", torch.float32, count, None), int(part(state, "stride", torch.int64))
        if stride < 1 or not 0 < kept.shape[1] <= self.keep:
            raise OctavoError(f"a sample of {kept.shape[1]} numbers, one of {stride}, does not fit {self}")
        super()._restore(state, count)
        self.kept, self._stride = kept, stride
