"""Weights rounded by what the data shows, one layer after the other, in one walk through the model.

Two streams of the same data go through the model side by side (``calibration.lockstep``): one as the float model runs
it, one in 8 bits. At a layer the inputs of both are known, its weight is rounded so that the second stream comes near
to the first (``ptq.gptq``), and the second goes on through the layer as it will be. So every layer answers for what the
layers before it have left over, which one pass over a model that is float everywhere could not show, and nothing of the
model has changed until all is done.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.batches import Call, Track, eagerly, enter, evaluating, several
from octavo.calibration.lockstep import Halt, walk
from octavo.core.qtensor import QTensor
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.nn.layer import QuantizedLayer
from octavo.nn.linear import QuantizedLinear
from octavo.nn.swap import Layer
from octavo.ops.outliers import column_peaks
from octavo.ptq.gptq import GPTQ, Moments, Rounder
from octavo.ptq.rules import Rule, catches_all

#: Rounds a matrix to the nearest, with scales of its own: what a layer's weight becomes without data.
Nearest = Callable[[Tensor], tuple[Scheme, QTensor]]


@dataclass
class Job:
    """A layer that becomes 8-bit: how its weight is rounded to the nearest, its input's static scales.

    ``by_data`` says whether it is rounded here; the others are run in 8 bits for what follows them.
    """

    layer: Layer
    nearest: Nearest
    scales: Mapping[str, Any]
    by_data: bool
    result: tuple[Scheme, QTensor] | None = field(default=None, init=False)


def rounded_by_data(deciding: Mapping[Layer, Rule]) -> tuple[list[str], list[str]]:
    """The layers whose rules round them by data, by name, and notes on those that cannot be.

    ``deciding``: every layer that becomes 8-bit, with its rule. Raises ``OctavoError`` where a rule for certain layers
    asks for what cannot be; a rule for all means: where it can.
    """
    sharing = Counter(id(layer.owner) for layer in deciding)
    names, refused = [], []
    for layer, rule in deciding.items():
        if rule.rounding == "nearest":
            continue
        why = _obstacle(layer, sharing[id(layer.owner)] > 1)
        if why is None:
            names.append(layer.name)
        elif catches_all(rule):
            refused.append(f"{layer.name} is rounded to the nearest: {why}")
        else:
            raise OctavoError(f"{layer.name} cannot be rounded by GPTQ: {why}; use rounding='nearest' in its rule")
    if refused and not names:
        raise OctavoError(f"no layer can be rounded by GPTQ; {refused[0]}")
    return names, refused


def _obstacle(layer: Layer, shared: bool) -> str | None:
    if layer.eight_bit is not QuantizedLinear:
        return f"it is no linear layer ({layer.kind})"
    if shared:
        return "it shares its weight with another layer, whose inputs are others"
    return None


def round_weights(
    model: nn.Module,
    jobs: Sequence[Job],
    batches: Iterable[Any],
    how: GPTQ = GPTQ(),  # noqa: B008 - it is frozen
    *,
    allow_unreached: bool = False,
    call: Call | None = None,
    track: Track | None = None,
) -> dict[str, tuple[Scheme, QTensor]]:
    """By layer name the scheme and the rounded weight of every job that is ``by_data`` and that data reached.

    ``jobs`` come in the model's order; ``batches`` and ``call`` as for calibration, but all batches are in memory
    together. The model stays as it is. Raises ``OctavoError`` for no data, and with the layer's name for NaN or Inf in
    its input, for a layer that one batch calls several times, and, unless ``allow_unreached``, for one without data.
    """
    held = list(several(batches))
    if not held:
        raise OctavoError("the data held no batch; a generator can be read only once")
    progress = iter(track([job.layer.name for job in jobs], "rounding")) if track else None
    work = _Walk({job.layer.name: job for job in jobs}, how, len(held), progress)
    runs = [partial(_run, model, number, batch, call) for number, batch in enumerate(held) for _ in range(work.streams)]
    with evaluating(model), eagerly(model), torch.no_grad():
        walk(runs, {job.layer.name: job.layer.module for job in jobs}, work.visit, work.answer)
    work.finish()
    unreached = [job.layer.name for job in jobs if job.by_data and job.result is None]
    if unreached and not allow_unreached:
        raise OctavoError(
            f"{len(unreached)} layers that GPTQ is to round saw no data: {', '.join(unreached[:5])}. Pass data that "
            "reaches them, round them to the nearest by a rule of their own, or by allow_uncalibrated=True "
            "(--allow-uncalibrated)"
        )
    return {job.layer.name: job.result for job in jobs if job.result is not None}


def _run(model: nn.Module, number: int, batch: Any, call: Call | None) -> None:
    try:
        enter(model, batch, call)
    except OctavoError as error:
        raise OctavoError(f"rounding, batch {number}: {error}") from error
    except Exception as error:
        raise OctavoError(f"rounding stopped in batch {number} with {type(error).__name__}: {error}") from error


class _Walk:
    """What is done at each layer. Of a batch's runs the last is in 8 bits, and one before it the float model's."""

    def __init__(self, jobs: Mapping[str, Job], how: GPTQ, batches: int, progress: Any) -> None:
        self.jobs, self.how, self.batches, self.progress = jobs, how, batches, progress
        self.streams = 2 if how.follow else 1
        self.eight_bit: dict[str, QuantizedLayer] = {}
        self.called: set[tuple[str, int]] = set()
        self.last: tuple[list[tuple[Tensor, int]], QuantizedLayer, Rounder] | None = None

    def visit(self, name: str, calls: Mapping[int, tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """Round the layer's weight by what all runs are about to show it."""
        job = self.jobs[name]
        matrix = job.layer.matrix.detach()
        layer = self._run_as(job, *job.nearest(matrix))
        if job.by_data:
            given = {run: _input(name, matrix.shape[1], *call) for run, call in calls.items()}
            self._round(job, layer, matrix, given)
        if self.progress is not None:
            next(self.progress, None)

    def answer(
        self, name: str, run: int, usual: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The layer's result: in the float stream its own, in the other what it will be in 8 bits."""
        if (name, run) in self.called and self.jobs[name].by_data:
            raise OctavoError(
                f"one batch calls layer {name} several times, and GPTQ rounds it by the first; round it to the nearest"
            )
        self.called.add((name, run))
        if run and len(self.eight_bit) == len(self.jobs):  # all is rounded; one run goes on, in case it comes back
            raise Halt
        return self.eight_bit[name].forward(*args, **kwargs) if self._quantized(run) else usual(*args, **kwargs)

    def finish(self) -> None:
        """Let the progress come to its end."""
        for _ in self.progress or ():
            pass

    def _quantized(self, run: int) -> bool:
        return run % self.streams == self.streams - 1

    def _run_as(self, job: Job, scheme: Scheme, weight: QTensor) -> QuantizedLayer:
        """The layer in 8 bits, for what follows."""
        new = job.layer.eight_bit.replacing(job.layer.module, weight, scheme, **job.scales).eval()
        self.eight_bit[job.layer.name] = new
        return new

    def _round(self, job: Job, layer: QuantizedLayer, matrix: Tensor, given: Mapping[int, Tensor]) -> None:
        rounder = self._rounder(job, layer, matrix, given)
        if rounder.rows > 0:
            target = rounder.target(matrix)
            scheme, nearest = job.nearest(target)
            job.result = scheme, rounder.round(target, nearest, scheme.weight)
            self._run_as(job, *job.result)

    def _rounder(self, job: Job, layer: QuantizedLayer, matrix: Tensor, given: Mapping[int, Tensor]) -> Rounder:
        """What the inputs show, made once for layers that get the very same (q, k and v)."""
        inputs = [(x, -1 if x.is_inference() else x._version) for x in given.values()]
        if self.last is not None:
            before, like, rounder = self.last
            same = len(before) == len(inputs) and all(
                a is b and i == j >= 0 for (a, i), (b, j) in zip(before, inputs, strict=True)
            )
            if same and _cast_alike(like, layer):
                return rounder
        self.last = None  # before the next takes its memory
        halves = (Moments(matrix.shape[1], matrix.device), Moments(matrix.shape[1], matrix.device))
        for run, x in given.items():
            if self._quantized(run):
                seen = _seen(layer, x)
                exact = given[run - 1].flatten(0, -2) if self.streams == 2 and run - 1 in given else None
                _halve(halves, run // self.streams, self.batches, seen, exact)
        if not all(bool(part.square.isfinite().all() & part.cross.isfinite().all()) for part in halves):
            raise OctavoError(f"the input of layer {job.layer.name} holds NaN or Inf; find where they come from first")
        try:
            rounder = Rounder(halves, self.how)
        except OctavoError as error:
            raise OctavoError(f"layer {job.layer.name}: {error}") from error
        self.last = (inputs, layer, rounder)
        return rounder


def _halve(halves: tuple[Moments, Moments], batch: int, batches: int, x: Tensor, exact: Tensor | None) -> None:
    """Add rows to the half that the batch belongs to; those of a single batch to both, its first half to the first."""
    if batches > 1:
        halves[batch % 2].update(x, exact)
        return
    middle = len(x) // 2
    matching = exact is not None and exact.shape == x.shape
    for half, rows in zip(halves, (slice(None, middle), slice(middle, None)), strict=True):
        half.update(x[rows], exact[rows] if matching and exact is not None else None)


def _input(name: str, width: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is None or not x.is_floating_point() or x.shape[-1:] != (width,):
        what = "no tensor" if x is None else f"{x.dtype} {list(x.shape)}"
        raise OctavoError(f"layer {name} takes floats […, {width}], and was called with {what}")
    return x[None] if x.ndim == 1 else x


def _seen(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """The input […, K] as rows [T, K] of the numbers that the 8-bit layer multiplies."""
    rows = x.flatten(0, -2)
    if layer.scheme.input is None:
        return rows
    threshold = layer.scheme.outliers
    large = None if threshold is None else column_peaks(rows) > threshold  # these columns stay as they are
    rest = rows if large is None else rows.masked_fill(large, 0)
    seen = layer.quantize_input(rest).dequantize(torch.float32)
    return seen if large is None else torch.where(large, rows.float(), seen)


def _cast_alike(one: QuantizedLayer, other: QuantizedLayer) -> bool:
    """Whether two layers cast their inputs the same way."""
    scales = [(x.input_scale, x.input_zero_point) for x in (one, other)]
    equal = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(*scales, strict=True))
    return one.scheme.input == other.scheme.input and equal
