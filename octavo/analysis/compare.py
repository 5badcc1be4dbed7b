"""For every layer and every candidate scheme: what it costs, what it saves, and how long it takes here.

A cell of the table is exact: the model runs on the data with this one layer quantized and nothing else changed, and its
results are compared with what they were. To make that affordable nothing before the layer is run twice (``replay``),
layers of one size are timed once (``variants``), and divergences (``judge``) say with a few hundred tokens what losses
would need many thousands for. Gradients could foretell cells in one pass (HAWQ, 1905.03696), but not where it matters
most: massive activations are far outside the range in which a second order holds.

Work: cells × half a forward of the data that they are measured on. SmolLM2-135M, 210 layers × 5 schemes on 160 tokens
took 336 s on two cores, 530 s while others worked on them; ``python -m benchmarks.choosing`` measures it.
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from octavo.analysis import machine, variants
from octavo.analysis.comparison import Candidate, Cell, ComparedLayer, Comparison, Outcome
from octavo.analysis.judge import Judge, Loss, Shift, judge_for
from octavo.analysis.replay import Recording
from octavo.analysis.variants import Timing, Variant
from octavo.calibration.batches import Call, Track, eagerly, enter, evaluating, several
from octavo.core import schemes
from octavo.core.cast import sqnr
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.nn import swap
from octavo.nn.swap import Layer
from octavo.ptq.quantize import model_bytes, quantize_
from octavo.ptq.rules import Rule, output_heads
from octavo.ptq.smooth import Foreseen, foresee

SCHEMES: tuple[str, ...] = ("int8-dynamic", "fp8-dynamic", "int8-group64", "e3m4-int8-group64", "int8-weight-only")
AS_IT_IS = Candidate(None)
TURNS = 3  # runs of a whole model that are timed


def compare(
    model: nn.Module,
    data: Iterable[Any],
    schemes: Sequence[Scheme | str | Candidate] = SCHEMES,
    *,
    calibration: Iterable[Any] | None = None,
    cells_on: int | None = None,
    loss: Loss | None = None,
    call: Call | None = None,
    whole: bool = True,
    name: str = "",
    source: str = "",
    track: Track | None = None,
) -> Comparison:
    """Every layer that a scheme for all would quantize, under every scheme; the model is as before afterwards.

    ``data``: batches as for calibration; token batches of a causal language model are judged by the next token, all
    others by the outputs, or by ``loss(output, batch)``. ``calibration``: other batches for whole models whose scheme
    looks at data. ``cells_on``: how many batches the cells are measured on (None: all); ``whole`` measures the whole
    model under each scheme on all. ``call`` as for calibration; ``name``, ``source``: the model and the data in words.
    ``track`` wraps loops to show progress.

    Raises ``OctavoError`` without data, if no layer can be quantized, or if the model's own results are not finite.
    """
    table = Table(model, data, schemes, calibration=calibration, cells_on=cells_on, loss=loss, call=call)
    return compared(table, whole, name, source, track)


def compared(
    table: "Table", whole: bool = False, name: str = "", source: str = "", track: Track | None = None
) -> Comparison:
    """All cells of a table, and the whole model under every candidate if that is wanted."""
    started = time.perf_counter()
    layers, cells = table.cells(track)
    measured = time.perf_counter()
    outcomes = [table.outcome(candidate) for candidate in _tracked(table.candidates, track, whole)]
    return Comparison(
        model=name or type(table.model).__name__,
        data=source or f"{len(table.batches)} batches",
        machine=_machine(),
        loss=table.loss,
        perplexity=table.perplexity(table.loss),
        divergence=table.judge.divergence,
        bytes=model_bytes(table.model),
        layers=tuple(layers),
        candidates=table.candidates,
        cells=tuple(cells),
        outcomes=tuple(outcomes),
        seconds={"cells": measured - started, "whole models": time.perf_counter() - measured},
        notes=tuple(table.notes),
    )


class Table:
    """The model as it is, run once on all data, and whatever others are to be compared with it."""

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        candidates: Sequence[Scheme | str | Candidate],
        *,
        calibration: Iterable[Any] | None = None,
        cells_on: int | None = None,
        loss: Loss | None = None,
        call: Call | None = None,
    ) -> None:
        self.model, self.call = model, call
        self.batches = list(several(data))
        if not self.batches:
            raise OctavoError("there is no data to compare on; pass some batches, as for calibration")
        self.calibration = self.batches if calibration is None else list(several(calibration))
        self.candidates = as_candidates(candidates)
        self.layers = quantizable(model)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise OctavoError(f"{name} is on meta and has no numbers to compare; load the model first")
        self.notes: list[str] = []
        self.judge: Judge = judge_for(model, self.batches[0], loss)
        modules = [layer.module for layer in self.layers]
        self.recordings: list[Recording] = []
        self.references: list[Any] = []
        with running(model):
            for batch in self.batches[: cells_on or len(self.batches)]:
                recording = Recording(model, batch, modules, call)
                self.references.append(self.judge.reference(recording.output, batch))
                recording.output = None
                self.recordings.append(recording)
            for batch in self.batches[len(self.recordings) :]:
                self.references.append(self.judge.reference(enter(model, batch, call), batch))
        if not all(recording.exact for recording in self.recordings):
            self.notes.append("the model runs in full for every cell: it gives other results when parts only answer")
        losses = [self.judge.loss(reference) for reference in self.references]
        known = [told for told in losses if told is not None]
        if known and not sum(count for _, count in known):
            raise OctavoError(
                "the data holds nothing to predict: no batch has two tokens in a row that are not padding"
            )
        self.loss = sum(told[0] for told in known) / sum(told[1] for told in known) if known else None
        if self.loss is not None and not math.isfinite(self.loss):
            raise OctavoError(f"the loss of the model as it is is {self.loss}; nothing can be compared with that")

    def perplexity(self, loss: float | None) -> float | None:
        """What a loss in nats a token is as a perplexity; None for other losses."""
        return math.exp(min(loss, 700.0)) if loss is not None and self.judge.nats else None

    def cells(self, track: Track | None = None) -> tuple[list[ComparedLayer], list[Cell]]:
        """Every layer under every candidate."""
        layers, cells = [], []
        clock = _Clock()
        with running(self.model):
            for layer in _tracked(self.layers, track, True, "comparing layers"):
                shapes = [r.shapes[layer.module] for r in self.recordings if layer.module in r.shapes]
                shape = max(shapes, key=lambda s: torch.Size(s).numel(), default=())
                calls = sum(recording.calls.get(layer.module, 0) for recording in self.recordings)
                found = self._row(layer, calls, clock, shape)
                layers.append(self._described(layer, calls, shape, clock))
                cells += found
        return layers, cells

    def _row(self, layer: Layer, calls: int, clock: "_Clock", shape: tuple[int, ...]) -> list[Cell]:
        cells = []
        needed = calls and any(variants.looks_at_inputs(c) for c in self.candidates)
        inputs = [x for recording in self.recordings for x in recording.inputs(layer.module)] if needed else []
        made: dict[str, nn.Module] = {}  # by scheme: neither smoothing nor how a weight is rounded takes time
        for candidate in self.candidates:
            why = variants.unsuitable(layer, candidate, self.smoothing.left)
            why = why or ("no data reached it" if not calls else None)
            if candidate.scheme is None:
                cells.append(Cell(layer.name, candidate.name, math.inf, math.inf, 0.0, 0.0, layer.nbytes))
            elif why is not None:
                cells.append(Cell(layer.name, candidate.name, excluded=why))
            else:
                try:
                    variant = Variant(layer, candidate, inputs, self._scale(layer, candidate))
                except OctavoError as error:
                    cells.append(Cell(layer.name, candidate.name, excluded=str(error)))
                else:
                    cells.append(self._cell(layer, candidate, variant))
                    made.setdefault(_kind(candidate), variant.layer)
        clock.look(layer, made, shape)
        return [
            clock.timed(layer, cell, candidate, shape) for cell, candidate in zip(cells, self.candidates, strict=True)
        ]

    def _cell(self, layer: Layer, candidate: Candidate, variant: Variant) -> Cell:
        power = noise = 0.0
        own = layer.module.forward

        def both(*args: Any, **kwargs: Any) -> Any:
            nonlocal power, noise
            result = variant(*args, **kwargs)
            exact = own(*args, **kwargs).double()
            power += float(exact.square().sum())
            noise += float((result.double() - exact).square().sum())
            return result

        shift = Shift()
        for recording, reference in zip(self.recordings, self.references, strict=False):  # the first of them
            shift += self.judge.shift(reference, recording.run({layer.module: both}), recording.batch)
        output = math.inf if noise == 0 else 10 * math.log10(power / noise) if power and noise < math.inf else -math.inf
        why = None if shift.finite and math.isfinite(noise) else "its results are NaN or Inf under this scheme"
        weight = sqnr(layer.weight, variant.weight)
        if why is not None:
            return Cell(layer.name, candidate.name, weight, None, None, None, variant.bytes, None, why)
        return Cell(layer.name, candidate.name, weight, output, shift.increase, shift.distance, variant.bytes)

    def _described(self, layer: Layer, calls: int, shape: tuple[int, ...], clock: "_Clock") -> ComparedLayer:
        rows, columns = layer.matrix.shape
        count, timing = torch.Size(shape).numel(), clock.of(layer, AS_IT_IS, shape)
        convolution = layer.weight.ndim > 2  # a row a position; strides and padding left aside
        tokens = count // max(1, layer.weight.shape[1] if convolution else columns)
        return ComparedLayer(
            name=layer.name,
            names=layer.names,
            kind=layer.kind,
            shape=(rows, columns),
            parameters=layer.weight.numel(),
            bytes=layer.nbytes,
            calls=calls,
            rows=tokens if calls else 0,
            seconds=None if timing is None else timing.seconds,
        )

    @cached_property
    def smoothing(self) -> Foreseen:
        """What smoothing would do under any of the candidates, looked up once for all cells and mixes."""
        alphas = [candidate.smooth for candidate in self.candidates if candidate.smooth is not None]
        if not alphas:
            return Foreseen((), {}, {})
        try:
            return foresee(self.model, self.calibration, alphas, self.call)
        except OctavoError as error:
            return Foreseen((), dict.fromkeys((layer.name for layer in self.layers), str(error)), {})

    def _scale(self, layer: Layer, candidate: Candidate) -> Tensor | None:
        if candidate.smooth is None:
            return None
        if (scale := self.smoothing.scales[candidate.smooth].get(layer.name)) is None:
            raise OctavoError("it cannot be smoothed: it is no linear layer")
        return scale

    def outcome(self, candidate: Candidate) -> Outcome:
        """The whole model under one candidate."""
        if candidate.scheme is None:
            seconds, size = min(self.pace(self.model)), model_bytes(self.model)
            return Outcome(candidate.name, self.loss, self.perplexity(self.loss), 0.0, 0.0, size, seconds)
        rule = Rule(candidate.scheme, smooth=candidate.smooth, rounding=candidate.rounding)
        try:
            mix = self.mix([rule])
        except OctavoError as error:
            return Outcome(candidate.name, excluded=str(error))
        shift, (_, seconds) = self.shift(mix), self.pace(mix)
        left = tuple(x.name for x in self.layers if mix.get_submodule(x.name).__class__ is type(x.module))
        size = model_bytes(mix)
        if not shift.finite:
            return Outcome(
                candidate.name, bytes=size, seconds=seconds, left=left, excluded="its results are NaN or Inf"
            )
        loss = None if self.loss is None or shift.increase is None else self.loss + shift.increase
        return Outcome(candidate.name, loss, self.perplexity(loss), shift.distance, shift.error, size, seconds, left)

    def mix(self, rules: Sequence[Rule]) -> nn.Module:
        """A copy of the model, quantized by rules."""
        twin = copy.deepcopy(self.model)
        looking = any(map(variants.looks_at_data, rules))
        with running(twin):
            quantize_(twin, rules, self.calibration if looking else None, allow_uncalibrated=True)
        return twin

    def shift(self, mix: nn.Module) -> Shift:
        """How far another model is from this one, on all of the data."""
        total = Shift()
        with running(mix):
            for batch, reference in zip(self.batches, self.references, strict=True):
                total += self.judge.shift(reference, enter(mix, batch, self.call), batch)
        return total

    def pace(self, mix: nn.Module) -> tuple[float, float]:
        """Seconds that the model and another take for the largest batch: the fastest of some runs, taking turns."""
        batch = max(self.batches, key=_numbers)
        best = [math.inf, math.inf]
        for _ in range(TURNS):
            for at, way in enumerate((self.model, mix)):
                with running(way):
                    began = time.perf_counter()
                    enter(way, batch, self.call)
                    if torch.cuda.is_initialized():
                        torch.cuda.synchronize()
                    best[at] = min(best[at], time.perf_counter() - began)
        return best[0], best[1]


def _numbers(batch: Any) -> int:
    """How many numbers a batch holds."""
    return sum(
        leaf.numel()
        for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
        if isinstance(leaf, Tensor)
    )


class _Clock:
    """The time of every sort of layer under every scheme, measured when the first of its sort comes by."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, Timing]] = {}

    def look(self, layer: Layer, made: Mapping[str, nn.Module], shape: tuple[int, ...]) -> None:
        """Time the layer as it is and under schemes, unless their like has been timed."""
        known = self.known.setdefault(variants.sort_of(layer, shape), {})
        new = {name: way for name, way in made.items() if name not in known}
        if not shape or not (new or AS_IT_IS.name not in known):
            return
        x = torch.randn(shape, dtype=layer.weight.dtype, device=layer.weight.device)
        known |= variants.timings({AS_IT_IS.name: layer.module, **new}, x)

    def of(self, layer: Layer, candidate: Candidate, shape: tuple[int, ...]) -> Timing | None:
        """What was measured, if it was."""
        return self.known.get(variants.sort_of(layer, shape), {}).get(_kind(candidate))

    def timed(self, layer: Layer, cell: Cell, candidate: Candidate, shape: tuple[int, ...]) -> Cell:
        """The cell with its time."""
        found = self.of(layer, candidate, shape)
        return cell if found is None else replace(cell, seconds=found.seconds, spread=found.spread)


def _kind(candidate: Candidate) -> str:
    """What decides how long a layer takes under a candidate."""
    return Candidate(candidate.scheme).name


def as_candidates(given: Sequence[Scheme | str | Candidate]) -> tuple[Candidate, ...]:
    """Schemes, their names and candidates as candidates, none twice; the layer as it is comes first."""
    if isinstance(given, Scheme | str | Candidate):
        given = [given]
    made = [c if isinstance(c, Candidate) else Candidate(schemes.get(c)) for c in given]
    if not any(candidate.scheme is not None for candidate in made):
        raise OctavoError("there is no scheme to compare; name some, such as int8-dynamic")
    return tuple(dict.fromkeys([AS_IT_IS, *made]))


def quantizable(model: nn.Module) -> list[Layer]:
    """The layers that one scheme for all would quantize: neither tables nor the output head."""
    found = swap.layers(model)
    heads = output_heads(model, found)
    able = [x for x in found if x.obstacle is None and not x.eight_bit.by_name_only and x.module not in heads]
    if not able:
        why = "; ".join(f"{x.name or 'the model itself'}: {x.obstacle or 'table or output head'}" for x in found[:3])
        raise OctavoError(f"no layer can be quantized ({why or 'the model has no parameters'})")
    return able


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, compilation, or torch's shortcuts past the layers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), eagerly(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _tracked(items: Sequence[Any], track: Track | None, wanted: bool, doing: str = "comparing models") -> Iterable[Any]:
    if not wanted:
        return ()
    return track(list(items), doing) if track else items


def _machine() -> str:
    return f"{machine._processor()}, {torch.get_num_threads()} threads"
