"""How numbers lie within the range that a Cast gives them: their histogram, what is clipped, what becomes zero.

A stream is looked at twice: an observer finds the range first, then a ``Tally`` counts exactly, a tensor at a time.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.batches import Track, enter, evaluating
from octavo.core.cast import Cast, quantize_scaled, quantize_unchecked
from octavo.core.granularity import expand_blocks
from octavo.errors import OctavoError

BINS = 96


@dataclass(frozen=True)
class Spread:
    """What a ``Tally`` found.

    ``counts`` and ``clipped``: of all numbers, and of the clipped ones, in even bins from ``low`` to ``high``, the
    exact ends. ``zeroed``: numbers other than 0 that become 0. ``ranges``: how many blocks there are (0: every tensor
    makes its own). ``widest`` and ``narrowest``: the ranges, as (low, high), with most and with least room.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    clipped: tuple[int, ...]
    zeroed: int
    ranges: int
    widest: tuple[float, float]
    narrowest: tuple[float, float]
    sqnr: float

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(self.counts)

    @property
    def edges(self) -> list[float]:
        """Where the bins begin and end."""
        step = (self.high - self.low) / len(self.counts)
        return [self.low + i * step for i in range(len(self.counts))] + [self.high]

    @property
    def clipped_share(self) -> float:
        """The share of the numbers that the range is too narrow for."""
        return sum(self.clipped) / max(1, self.count)


class Tally:
    """Counts tensors whose numbers lie from ``low`` to ``high``, cast by ``how`` with these scales, or with their own.

    A number is clipped if saturation moves it further than rounding could have: by more than half the last step.
    """

    def __init__(
        self, low: float, high: float, how: Cast, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> None:
        self.low, self.high, self.how, self.scale, self.zero_point = low, high, how, scale, zero_point
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.clipped = torch.zeros(BINS, dtype=torch.int64)
        self.zeroed = 0
        self.power = self.noise = 0.0
        self.widest = self.narrowest = (math.nan, math.nan)

    def update(self, x: Tensor) -> None:
        """Count another tensor."""
        if x.numel() == 0:
            return
        x = x.detach()
        if self.scale is None:
            q = quantize_unchecked(x, self.how)
        else:
            q = quantize_scaled(x, self.how, self.scale, self.zero_point)
        y, x = q.dequantize(torch.float32), x.float()
        zero = 0 if q.zero_point is None else q.zero_point
        fmt = self.how.format
        last = float(fmt.values()[-1] - fmt.values()[-2])
        bottom = fmt.min if self.how.affine else max(fmt.min, -fmt.max)
        low, high = (bottom - zero) * q.scale, (fmt.max - zero) * q.scale
        self._see_ranges(low, high)
        low, high = (expand_blocks(edge, tuple(x.shape), q.block) for edge in (low, high))
        slack = expand_blocks(0.5001 * last * q.scale, tuple(x.shape), q.block)
        beyond = (x > high + slack) | (x < low - slack)
        width = (self.high - self.low) / BINS
        places = ((x - self.low) / width).long().clamp(0, BINS - 1) if width > 0 else torch.zeros_like(x).long()
        self.counts += torch.bincount(places.reshape(-1), minlength=BINS).cpu()
        self.clipped += torch.bincount(places[beyond], minlength=BINS).cpu()
        self.zeroed += int(((y == 0) & (x != 0)).sum())
        self.power += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        self.noise += float(torch.linalg.vector_norm(x - y, dtype=torch.float64)) ** 2

    def _see_ranges(self, low: Tensor, high: Tensor) -> None:
        width = (high - low).reshape(-1)
        for name, place in (("widest", width.argmax()), ("narrowest", width.argmin())):
            found = float(low.reshape(-1)[place]), float(high.reshape(-1)[place])
            known = getattr(self, name)
            further = found[1] - found[0] > known[1] - known[0]
            if math.isnan(known[0]) or further == (name == "widest"):
                setattr(self, name, found)

    def spread(self) -> Spread:
        """All that was counted. Raises ``OctavoError`` if nothing was."""
        if not int(self.counts.sum()):
            raise OctavoError("no numbers were counted")
        ratio = self.power / self.noise if self.noise else math.inf
        return Spread(
            low=self.low,
            high=self.high,
            counts=tuple(self.counts.tolist()),
            clipped=tuple(self.clipped.tolist()),
            zeroed=self.zeroed,
            ranges=0 if self.scale is None else self.scale.numel(),
            widest=self.widest,
            narrowest=self.narrowest,
            sqnr=10 * math.log10(ratio) if ratio > 0 else -math.inf,
        )


@torch.no_grad()
def watch_inputs(
    model: nn.Module,
    layer: str,
    batches: Iterable[Any],
    see: Callable[[Tensor], object],
    track: Track | None = None,
    doing: str = "watching",
) -> None:
    """Let ``see`` have every input of one layer while batches pass through the model in eval mode.

    Raises ``OctavoError`` if ``see`` does, with layer and batch, or if no batch comes to the layer.
    """
    number, reached = 0, False

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal reached
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not x.is_floating_point():
            raise OctavoError(f"layer {layer} takes {'no tensor' if x is None else x.dtype}, not float numbers")
        try:
            see(x)
        except OctavoError as error:
            raise OctavoError(f"the input of layer {layer} in batch {number}: {error}") from error
        reached = True

    handle = model.get_submodule(layer).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with evaluating(model):
            for batch in track(batches, doing) if track else batches:
                enter(model, batch)
                number += 1
    finally:
        handle.remove()
    if not reached:
        raise OctavoError(f"layer {layer} saw no data in {number} batches")
