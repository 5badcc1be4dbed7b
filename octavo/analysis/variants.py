"""One layer under a candidate, apart from its model: quantized by ``quantize_`` itself, and how long it takes.

The layer stands alone in a model of its own, whose data is what the layer gets in the real one. So everything that
``quantize_`` can do (static scales, rounding by data, refusals) is done here as it is done there. Smoothed it is by
scales that are found once for the whole model (``ptq.smooth.foresee``): its weight takes them, and a module before it
divides its input by them, as the norm would.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.analysis.comparison import Candidate
from octavo.core import schemes
from octavo.nn.layer import QuantizedLayer, tables_of
from octavo.nn.linear import QuantizedLinear
from octavo.nn.swap import Layer
from octavo.ptq.quantize import quantize_
from octavo.ptq.rules import Rule

REPEATS = 25
ENOUGH = 0.3  # seconds that one layer's timing may take, at least two runs of each


class _Channels(nn.Module):
    """Each channel times a number of its own."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(factors, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` […, channels]."""
        return x * self.weight


class Variant(nn.Module):
    """A layer under a candidate: ``forward`` stands in for the layer's own. Raises ``OctavoError`` if it cannot be.

    ``inputs``: what the layer gets, for candidates that look at data; ``scale`` [in]: what smoothing divides it by.
    """

    source: nn.Module | None
    layer: nn.Module

    def __init__(
        self, layer: Layer, candidate: Candidate, inputs: Sequence[Tensor], scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.source = None
        self.layer = _apart(layer.module)
        if scale is not None:
            self.source = _Channels(1 / scale.to(layer.weight))
            self.layer = copy.deepcopy(self.layer)
            with torch.no_grad():
                QuantizedLinear.matrix(self.layer).mul_(scale.to(layer.weight))
        rule = Rule(candidate.scheme, "layer", rounding=candidate.rounding)
        data = list(inputs) if looks_at_inputs(candidate) else None
        quantize_(self.eval(), [rule], data)

    @property
    def bytes(self) -> int:
        """Of the 8-bit layer; a smoothing scale goes into the norm and takes none."""
        return sum(t.nbytes for t in self.layer.buffers() if id(t) not in tables_of(self.layer))

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, with the smoothing undone."""
        assert isinstance(self.layer, QuantizedLayer)
        weight = self.layer.weight
        if self.source is None:
            return weight
        channels = self.source.weight
        assert isinstance(channels, Tensor)
        return weight * (channels[:, None] if getattr(self.layer, "transposed", False) else channels)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer makes of its input."""
        if self.source is None:
            return self.layer(*args, **kwargs)
        return self.layer(self.source(*args), **kwargs)


def looks_at_inputs(how: Candidate | Rule) -> bool:
    """Whether this cannot be done without the layer's inputs, once it is smoothed."""
    return how.rounding != "nearest" or (how.scheme is not None and schemes.get(how.scheme).static)


def looks_at_data(how: Candidate | Rule) -> bool:
    """Whether this cannot be done to a model without data."""
    return how.smooth is not None or looks_at_inputs(how)


@dataclass(frozen=True)
class Timing:
    """The fastest of some runs, and by what share of it the fastest of one half is slower than that of the other.

    So ``spread`` says how well the fastest can be repeated; how slow the slow ones are says only how busy others were.
    """

    seconds: float
    spread: float


def timings(ways: Mapping[str, nn.Module], x: Tensor) -> dict[str, Timing]:
    """How long each takes with this input, in runs that take turns; whatever disturbs one only adds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    started = time.perf_counter()
    for turn in range(-1, REPEATS):
        for name, way in ways.items():
            began = time.perf_counter()
            way(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - began)
        if turn >= 1 and time.perf_counter() - started > ENOUGH * len(ways):
            break
    return {name: _timing(found) for name, found in times.items()}


def _timing(runs: Sequence[float]) -> Timing:
    halves = sorted((min(runs[::2]), min(runs[1::2])))
    return Timing(halves[0], halves[1] / halves[0] - 1)


def sort_of(layer: Layer, shape: tuple[int, ...]) -> str:
    """What layers that take equally long have in common: their kind, size, settings, dtype and input."""
    size, settings = list(layer.weight.shape), layer.module.extra_repr()
    return f"{type(layer.module).__name__} {size} {settings} {layer.weight.dtype} {list(shape)}"


def _apart(module: nn.Module) -> nn.Module:
    """The module without its hooks, sharing its numbers; hooks belong to the model it came from."""
    apart = copy.copy(module)
    for name in vars(module):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            setattr(apart, name, type(getattr(module, name))())
    vars(apart).pop("forward", None)
    return apart


def unsuitable(layer: Layer, candidate: Candidate, pairs: Mapping[str, str] | None) -> str | None:
    """Why a layer cannot run under a candidate, as far as can be told before it is tried.

    ``pairs``: layers that cannot be smoothed and why.
    """
    if candidate.scheme is None:
        return None
    if (refusal := layer.refusal(candidate.scheme)) is not None:
        return refusal
    if candidate.smooth is not None and pairs is not None and (why := pairs.get(layer.name)) is not None:
        return f"it cannot be smoothed: {why}"
    return None
