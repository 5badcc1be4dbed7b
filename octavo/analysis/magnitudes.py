"""How large the numbers of a layer are, measured by what their scale will see: the largest number of their row.

A row is what shares a scale where there is one a channel (weights) or a token (inputs). Divided by its row's largest
number, every number lies from -1 to 1, where a format's values lie too once they are divided by the format's largest;
so one number line shows which numbers a format tells apart, and which it rounds to zero. Octaves, not steps, are what
counts there: INT8 spends half of its values on the topmost octave, E4M3 as many on each of fifteen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.batches import Call, Track, enter, evaluating
from octavo.nn.swap import Layer

OCTAVES = 16
PER_OCTAVE = 3


@dataclass(frozen=True)
class Magnitudes:
    """How many numbers there are of each size.

    ``counts``: in thirds of an octave, from 2**-16 to 1 of their row's largest number. ``below``: how many are smaller
    and not zero; ``zeros``: how many are zero or lie in a row of zeros.
    """

    counts: tuple[int, ...]
    below: int
    zeros: int

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return sum(self.counts) + self.below + self.zeros


@dataclass(frozen=True)
class LayerMagnitudes:
    """The numbers of one layer; ``inputs`` is None where no data came to it, or no float numbers."""

    layer: str
    weights: Magnitudes
    inputs: Magnitudes | None


def of(x: Tensor) -> Magnitudes:
    """The magnitudes of a tensor [..., numbers of a row]; numbers that are not finite are left out."""
    return _settled(_counted(x))


@torch.no_grad()
def magnitudes(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    *,
    call: Call | None = None,
    track: Track | None = None,
) -> tuple[LayerMagnitudes, ...]:
    """Of these layers' weights, and of their inputs while batches pass through the model in eval mode."""
    seen: dict[str, Tensor] = {}

    def watch(layer: Layer) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is not None and x.is_floating_point() and x.numel():
                beside = layer.weight.ndim - 1  # a convolution's channels and positions have one scale, as a patch has
                rows = x if beside < 2 else x.flatten(x.ndim - beside)
                seen[layer.name] = seen.get(layer.name, 0) + _counted(rows)

        return look

    handles = [x.module.register_forward_pre_hook(watch(x), with_kwargs=True) for x in layers]
    try:
        with evaluating(model):
            for batch in track(batches, "counting") if track else batches:
                enter(model, batch, call)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        LayerMagnitudes(x.name, of(x.matrix), _settled(seen[x.name]) if x.name in seen else None) for x in layers
    )


def _counted(x: Tensor) -> Tensor:
    """Counts [1 + 1 + OCTAVES * PER_OCTAVE]: zeros, those below all bins, the bins."""
    x = x.detach().abs().float()
    x = x.where(x.isfinite(), 0.0)
    relative = x / x.amax(-1, keepdim=True)  # NaN where a row is zero
    bins = OCTAVES * PER_OCTAVE
    place = (relative.log2() * PER_OCTAVE).ceil().nan_to_num(neginf=-1e9).clamp(-bins, 0) + bins + 1
    place = place.where(relative > 0, 0.0)
    return torch.bincount(place.long().reshape(-1), minlength=bins + 2).cpu()


def _settled(counted: Tensor) -> Magnitudes:
    zeros, below, *counts = counted.tolist()
    return Magnitudes(tuple(counts), below, zeros)
