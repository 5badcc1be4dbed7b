"""Outliers planted into a model that computes the same as before: published orderings, shown on a small model.

Large language models grow outlier dimensions by themselves, small ones hardly do. But wherever a norm is read by linear
layers only, a channel of its gain can be multiplied and the weights that read it divided: the function is unchanged,
and its activations have an outlier, as large as one wants (it is SmoothQuant, 2211.10438, backwards). All factors are
powers of two, so that not a bit of the results changes in floating point, as long as nothing underflows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.analysis.outliers import THRESHOLD
from octavo.calibration.batches import Call
from octavo.calibration.minmax import MinMax
from octavo.calibration.run import Calibration
from octavo.core.cast import Cast
from octavo.core.formats import INT8
from octavo.core.granularity import PerChannel
from octavo.errors import OctavoError
from octavo.nn.linear import QuantizedLinear
from octavo.ptq.pairs import Pair, find
from octavo.ptq.trial import Move, unfit


@dataclass(frozen=True)
class Planted:
    """What ``plant_outliers_`` changed: norms and their readers, and for each norm the channels with their factors."""

    pairs: tuple[Pair, ...]
    factors: tuple[dict[int, float], ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{pair}: {', '.join(f'channel {c} × {f:g}' for c, f in factors.items())}"
            for pair, factors in zip(self.pairs, self.factors, strict=True)
        )


@torch.no_grad()
def plant_outliers_(
    model: nn.Module,
    example: Any,
    channels: int | Sequence[int] = 6,
    size: float = 10 * THRESHOLD,
    *,
    call: Call | None = None,
    generator: torch.Generator | None = None,
) -> Planted:
    """Give the same channels of every norm that linear layers read outliers of about ``size``, in place.

    ``example`` is one batch as for calibration: each channel's largest magnitude in it is multiplied by the power of
    two that brings it nearest to ``size``. ``channels``: which, or how many, chosen by ``generator``. Raises
    ``OctavoError``, before anything is changed, if no norm can be scaled, or if it has no such channels.
    """
    pairs = _norms(model, example, call)
    if not pairs:
        raise OctavoError(f"{type(model).__name__} has no norm that only linear layers read; there is nowhere to plant")
    channelwise = Cast(INT8, PerChannel(-1))
    observers = {pair.readers[0]: MinMax(granularity=channelwise.granularity) for pair in pairs}
    Calibration(observers).run(model, [example], call=call)
    widths = {pair.source: len(model.get_submodule(pair.source).get_parameter("weight")) for pair in pairs}
    least = min(widths.values())
    if isinstance(channels, int):
        generator = generator or torch.Generator().manual_seed(0)
        chosen = torch.randperm(least, generator=generator)[:channels].tolist()
    else:
        chosen = list(channels)
    if not chosen or not all(0 <= channel < least for channel in chosen):
        raise OctavoError(f"channels are from 0 to {least - 1}, at least one of them, not {channels!r}")
    planted = []
    for pair in pairs:
        low, high = observers[pair.readers[0]].range(channelwise)
        planted.append(_factors(torch.maximum(-low, high).flatten().cpu(), chosen, size))
    for pair, factors in zip(pairs, planted, strict=True):
        _scale(model, pair, factors)
    return Planted(tuple(pairs), tuple(planted))


def _norms(model: nn.Module, example: Any, call: Call | None) -> list[Pair]:
    """Norms whose channels only linear layers read, tried."""
    moves = {}
    for pair in find(model, example, call)[0]:
        if pair.kind == "norm":
            source = model.get_submodule(pair.source)
            readers = {name: model.get_submodule(name) for name in pair.readers}
            moves[pair] = Move(source, readers, torch.ones_like(source.get_parameter("weight")))
    wrong = unfit(model, moves.values(), example, call)
    return [pair for pair, move in moves.items() if move not in wrong]


def _factors(largest: Tensor, channels: Sequence[int], size: float) -> dict[int, float]:
    """The power of two a channel; 1 where a channel was always 0."""
    found = {}
    for channel in channels:
        peak = float(largest[channel])
        found[channel] = float(torch.exp2((torch.tensor(size / peak)).log2().round())) if peak else 1.0
    return found


def _scale(model: nn.Module, pair: Pair, factors: dict[int, float]) -> None:
    norm = model.get_submodule(pair.source)
    places = list(factors)
    for name, plus in (("weight", pair.plus), ("bias", 0.0)):
        parameter = norm._parameters.get(name)
        if parameter is not None:
            times = torch.tensor([*factors.values()], dtype=parameter.dtype, device=parameter.device)
            parameter[places] = (parameter[places] + plus) * times - plus
    for reader in pair.readers:
        matrix = QuantizedLinear.matrix(model.get_submodule(reader))
        times = torch.tensor([*factors.values()], dtype=matrix.dtype, device=matrix.device)
        matrix[:, places] = matrix[:, places] / times
