"""Quantize a model in place, and say what was done.

Everything that can go wrong is looked for first, over the whole model, so that a model is never left half quantized.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from octavo.calibration.batches import Call, Track, several
from octavo.calibration.minmax import MinMax
from octavo.calibration.observer import Observer
from octavo.calibration.run import Calibration
from octavo.core.cast import Cast, quantize_scaled, quantize_unchecked, sqnr
from octavo.core.qtensor import QTensor
from octavo.core.scaling import Constant
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError
from octavo.nn import swap
from octavo.nn.layer import tables_of
from octavo.nn.swap import Layer
from octavo.ptq.rounding import Job, round_weights, rounded_by_data
from octavo.ptq.rules import Rounding, Rules, assign, deciding
from octavo.ptq.smooth import Smoothing, requested, smoothed
from octavo.ptq.stacks import stacks, watch


@dataclass(frozen=True)
class LayerReport:
    """One layer: its scheme in words (None if left alone; ``reason`` says why), bytes, the weight's SQNR in dB.

    ``rounding``: how the weight was rounded.
    """

    name: str
    kind: str
    scheme: str | None
    reason: str
    bytes_before: int
    bytes_after: int
    sqnr: float | None = None
    rounding: Rounding = "nearest"

    @property
    def what(self) -> str:
        """The scheme, with how the weight was rounded if not to the nearest; or the reason."""
        rounding = "" if self.rounding == "nearest" else f", rounded by {self.rounding.upper()}"
        return (self.scheme or self.reason) + rounding


@dataclass(frozen=True)
class Summary:
    """What ``quantize_`` did: every layer with weights, the model's bytes before and after, the seconds it took.

    ``smoothing``: the pairs that were smoothed, if a rule asked for it.
    """

    layers: list[LayerReport]
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    smoothing: Smoothing | None = None

    @property
    def quantized(self) -> list[LayerReport]:
        """The layers that are in 8 bits now."""
        return [layer for layer in self.layers if layer.scheme is not None]

    @property
    def left(self) -> list[LayerReport]:
        """The layers that were left alone."""
        return [layer for layer in self.layers if layer.scheme is None]

    def groups(self) -> list[tuple[str, str, int, int, int, list[str]]]:
        """Rows (scheme or reason, kind, layers, bytes before, bytes after, names) for a table; 8-bit ones first."""
        rows: dict[tuple[bool, str, str], list[LayerReport]] = {}
        for layer in self.layers:
            rows.setdefault((layer.scheme is None, layer.what, layer.kind), []).append(layer)
        ordered = sorted(rows.items(), key=lambda row: (row[0][0], -sum(x.bytes_before for x in row[1])))
        return [
            (what, kind, len(xs), sum(x.bytes_before for x in xs), sum(x.bytes_after for x in xs), [x.name for x in xs])
            for (_, what, kind), xs in ordered
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} layers in 8 bits, {len(self.left)} left; {self.bytes_before / 1e6:.1f} MB → "
            f"{self.bytes_after / 1e6:.1f} MB in {self.seconds:.1f} s"
        ]
        for what, kind, count, before, after, names in self.groups():
            shown = ", ".join(names[:2]) + (" …" if count > 2 else "")
            lines.append(f"  {count:>4} {kind:<16} {before / 1e6:>9.1f} → {after / 1e6:<9.1f} MB  {what}  ({shown})")
        return "\n".join(lines + self.notes)


def quantize_(
    model: nn.Module,
    rules: Rules,
    data: "Iterable[Any] | Calibration | None" = None,
    *,
    observer: Observer = MinMax(),  # noqa: B008 - only its settings are used
    weight_observer: Observer | None = None,
    allow_uncalibrated: bool = False,
    track: Track | None = None,
) -> Summary:
    """Replace the model's layers by 8-bit ones, in place.

    ``rules``: a scheme or its name for all but the output head; ``{name pattern: scheme or None}``; or a list of
    ``Rule``. ``data``: batches (see ``Calibration.run``) or a finished ``Calibration``, for schemes with static input
    scales; for rules that smooth (see ``smooth_``) or round by "gptq" it is batches. ``observer`` says what range is
    made of them, ``weight_observer`` the same for weights (None: all of their range). A layer that saw no data is an
    error; under ``allow_uncalibrated`` it stays in float, or is rounded to the nearest. ``track`` wraps loops to show
    progress.

    Raises ``OctavoError`` before anything is changed if a rule or scheme matches nothing, nothing is left to quantize,
    calibration or smoothing fails or lacks data, an observer does not suit a scheme, or a weight is on the meta device
    or holds NaN, Inf or what float32 cannot hold. Ctrl-C leaves the model as it was, or smoothed, until layers are
    replaced; from then on some are in 8 bits, each of them whole.
    """
    started = time.perf_counter()
    verdict = check(model, rules)
    if weight_observer is not None:
        _check_observer(weight_observer, {x.name: s.weight for x, s in verdict.items() if isinstance(s, Scheme)})
    by_data, notes = rounded_by_data(deciding(model, list(verdict), rules))
    batches: list[Any] = []
    for what, needing in (("smoothed", list(requested(model, rules))), ("rounded by GPTQ", by_data)):
        if needing:
            data = batches = _kept(data, needing, what)
    static = bool(_observers(verdict, observer))
    rounded: dict[str, tuple[Scheme, QTensor]] = {}
    stacked: dict[str, Observer] = {}
    with smoothed(model, rules, batches, track, restorable=static or bool(by_data)) as smoothing:
        calibration = _calibration(model, verdict, data, observer, track)
        if calibration is not None and calibration.unreached:
            _uncalibrated(verdict, calibration, allow_uncalibrated)
        chosen = [(layer, scheme) for layer, scheme in verdict.items() if isinstance(scheme, Scheme)]
        inputs = {layer.name: _input_scales(layer, scheme, calibration) for layer, scheme in chosen}
        for stack in stacks(chosen):
            stacked |= dict.fromkeys((layer.name for layer in stack), watch(stack, weight_observer or MinMax()))
        if by_data:
            jobs = []
            for layer, _ in chosen:
                scheme, scales = inputs[layer.name]
                nearest = partial(_quantize_weight, scheme, weight_observer, stacked.get(layer.name))
                jobs.append(Job(layer, nearest, scales, layer.name in by_data))
            rounded = round_weights(model, jobs, batches, allow_unreached=allow_uncalibrated, track=track)
            del jobs
    before = model_bytes(model)
    reports = {x.name: LayerReport(x.name, x.kind, None, str(verdict[x]), x.nbytes, x.nbytes) for x in verdict}
    notes += _notes(verdict)
    if smoothing is not None:
        notes += smoothing.notes()
    if data is not None and calibration is None and not by_data and smoothing is None:
        notes.append("the data was not used: no layer has a static input scale")
    if stacked:
        notes.append(f"{len(stacked)} layers share one weight scale with those that engines stack them with")
    if lost := [name for name in by_data if name not in rounded]:
        notes.append(f"{', '.join(lost)}: saw no data, rounded to the nearest")
    owners = Counter(id(layer.owner) for layer, _ in chosen)
    shared: dict[tuple[int, Cast], tuple[Layer, QTensor]] = {}
    names, queue = [layer.name for layer, _ in chosen], deque(chosen)
    del verdict, chosen  # from here on only the queue keeps float weights alive, each until its turn
    for _ in track(names, "quantizing") if track else names:
        layer, scheme = queue.popleft()
        scheme, scales = inputs.pop(layer.name)
        rounding: Rounding = "gptq" if layer.name in rounded else "nearest"
        found = rounded.pop(layer.name, None)
        scheme, weight = found or _quantize_weight(
            scheme, weight_observer, stacked.get(layer.name), layer.matrix.detach()
        )
        if owners[id(layer.owner)] > 1:  # one weight under several layers stays one weight
            _, weight = shared.setdefault((id(layer.owner), scheme.weight), (layer, weight))
        new = layer.eight_bit.replacing(layer.module, weight, scheme, **scales)
        quality = sqnr(layer.weight, new.weight)
        swap.replace(model, layer, new)
        after = sum(t.nbytes for t in new.buffers() if id(t) not in tables_of(new))
        words = describe(scheme)
        reports[layer.name] = LayerReport(layer.name, layer.kind, words, "", layer.nbytes, after, quality, rounding)
    notes += no_smaller(reports.values())
    seconds = time.perf_counter() - started
    return Summary(list(reports.values()), before, model_bytes(model), seconds, notes, smoothing)


def calibrate(
    model: nn.Module,
    rules: Rules,
    batches: Iterable[Any],
    observer: Observer = MinMax(),  # noqa: B008 - only its settings are used
    *,
    call: Call | None = None,
    track: Track | None = None,
) -> Calibration:
    """Watch the inputs of all layers that the rules give a static scale; what comes back goes to ``quantize_`` as data.

    For data that several processes share (``Calibration.merge``), several runs, or models that need their own ``call``.
    """
    return prepare_calibration(model, rules, observer).run(model, batches, call=call, track=track)


def prepare_calibration(model: nn.Module, rules: Rules, observer: Observer = MinMax()) -> Calibration:  # noqa: B008
    """What ``calibrate`` runs, before it has seen anything: whoever holds it keeps what an interrupted run has seen."""
    observers = _observers(check(model, rules), observer)
    if not observers:
        raise OctavoError("no layer has a static input scale, so there is nothing to calibrate")
    return Calibration(observers)


def check(model: nn.Module, rules: Rules) -> dict[Layer, Scheme | str]:
    """What ``quantize_`` would do to every layer: its scheme, or why it is left alone. Raises what it would raise."""
    verdict = assign(model, swap.layers(model), rules)
    for layer, scheme in verdict.items():
        if isinstance(scheme, Scheme):
            _check(layer, scheme)
    return verdict


def no_smaller(reports: Iterable[LayerReport]) -> list[str]:
    """A note on layers whose new codes take no less memory than what was there, such as 16-bit ones after bfloat16."""
    large = [x for x in reports if x.scheme is not None and x.bytes_after >= x.bytes_before > 0]
    example = "".join(f"{x.name}: {x.bytes_before} → {x.bytes_after} bytes" for x in large[:1])
    return [f"{len(large)} layers take no less memory than before ({example})"] if large else []


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once; not the tables of formats, which layers share."""
    tables = {table for module in model.modules() for table in tables_of(module)}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t) and id(t) not in tables]
    return sum({(t.data_ptr() or id(t), t.nbytes): t.nbytes for t in tensors}.values())


def _check(layer: Layer, scheme: Scheme) -> None:
    for name, tensor in (("weight", layer.weight), ("bias", getattr(layer.module, "bias", None))):
        if tensor is None or tensor.numel() == 0:
            continue
        if tensor.is_meta:
            what = layer.name if name == "weight" else f"{layer.name}.{name}"
            raise OctavoError(f"{what} is on the meta device and holds no numbers; load the weights first")
        if not all(edge.float().isfinite() for edge in torch.aminmax(tensor.detach())):  # one pass; NaN wins both
            bad = int((~tensor.float().isfinite()).sum())
            beyond = " or numbers beyond float32" if tensor.dtype == torch.float64 else ""
            raise OctavoError(
                f"{layer.name}.{name} holds {bad} NaN or Inf{beyond} among its {tensor.numel()} values: the checkpoint "
                f"is damaged; mend it, or leave the layer alone with a rule for {layer.name!r}"
            )


def _observers(verdict: Mapping[Layer, Scheme | str], like: Observer) -> dict[str, Observer]:
    casts = {
        layer.name: scheme.input
        for layer, scheme in verdict.items()
        if isinstance(scheme, Scheme) and scheme.static and scheme.input is not None
    }
    _check_observer(like, casts)
    return {name: like.fresh(how.granularity) for name, how in casts.items()}


def _check_observer(observer: Observer, casts: Mapping[str, Cast]) -> None:
    """Raise ``OctavoError`` unless the observer suits all that it is to find ranges for, by layer."""
    if not isinstance(observer, Observer):
        raise OctavoError(f"an observer is octavo.calibration.MinMax(), .Percentile(99.99), …, not {observer!r}")
    for name, how in casts.items():
        try:
            if not isinstance(how.scale, Constant):
                observer.check(how)
        except OctavoError as error:
            raise OctavoError(f"{name}: {error}") from error


def _calibration(
    model: nn.Module,
    verdict: Mapping[Layer, Scheme | str],
    data: "Iterable[Any] | Calibration | None",
    observer: Observer,
    track: Track | None,
) -> Calibration | None:
    """What is known of the inputs of the layers with static scales; None if there are none."""
    observers = _observers(verdict, observer)
    if not observers:
        return None
    if data is None:
        raise OctavoError(
            f"{len(observers)} layers get static input scales ({next(iter(observers))}, …), which come from "
            "calibration: pass batches as data, or choose a dynamic scheme"
        )
    if not isinstance(data, Calibration):
        return Calibration(observers).run(model, data, track=track)
    if missing := [name for name in observers if name not in data.observers]:
        raise OctavoError(f"the calibration did not watch {', '.join(missing[:3])}; calibrate with these rules")
    return data


def _uncalibrated(verdict: dict[Layer, Scheme | str], calibration: Calibration, allowed: bool) -> None:
    """Leave layers without data in float, or say which they are."""
    lost = [x for x, scheme in verdict.items() if isinstance(scheme, Scheme) and x.name in calibration.unreached]
    lost = [x for x in lost if isinstance(scheme := verdict[x], Scheme) and scheme.static]
    if lost and not allowed:
        raise OctavoError(
            f"{len(lost)} layers saw no calibration data: {', '.join(x.name for x in lost[:5])}. Pass data that "
            "reaches them; if the model reads their weights without calling them, none does. Leave them out by a rule, "
            "or in float by allow_uncalibrated=True (--allow-uncalibrated)"
        )
    for layer in lost:
        verdict[layer] = "saw no calibration data"
    if not any(isinstance(scheme, Scheme) for scheme in verdict.values()):
        raise OctavoError("no layer saw calibration data, so nothing would be quantized")


def _kept(data: "Iterable[Any] | Calibration | None", layers: Sequence[str], what: str) -> list[Any]:
    """The batches, to be read more than once."""
    if data is None or isinstance(data, Calibration):
        lack = "a finished Calibration has kept none" if data is not None else "there is none"
        raise OctavoError(
            f"{len(layers)} layers are {what} ({layers[0]}, …), which looks at data, and {lack}: pass batches as data, "
            "or leave it out of the rules"
        )
    return list(several(data))


def _quantize_weight(
    scheme: Scheme, observer: Observer | None, watcher: Observer | None, matrix: Tensor
) -> tuple[Scheme, QTensor]:
    """The weight matrix in 8 bits, its scales in its own dtype.

    They span its whole range, or the one an observer finds, or what a ``watcher`` has seen of it and others.
    """
    how = scheme.weight
    if watcher is None and (observer is None or isinstance(how.scale, Constant)):
        return scheme, quantize_unchecked(matrix, how, matrix.dtype)
    if watcher is None:
        assert observer is not None
        watcher = observer.fresh(how.granularity)
        watcher.update(matrix)
    how = watcher.settle(how)
    scale, zero_point = watcher.scale(how, matrix.dtype)
    return replace(scheme, weight=how), quantize_scaled(matrix, how, scale, zero_point)


def _input_scales(layer: Layer, scheme: Scheme, calibration: Calibration | None) -> tuple[Scheme, dict[str, Any]]:
    """The calibrated scale of the layer's input, and the scheme with the format the observer settled for."""
    if calibration is None or scheme.input is None or not scheme.static:
        return scheme, {}
    seen = calibration.observers[layer.name]
    try:
        how = seen.settle(scheme.input)
        scale, zero_point = seen.scale(how, layer.weight.dtype)
    except OctavoError as error:
        raise OctavoError(f"the input of layer {layer.name}: {error}") from error
    return replace(scheme, input=how), {"input_scale": scale, "input_zero_point": zero_point}


def _notes(verdict: Mapping[Layer, Scheme | str]) -> list[str]:
    """Which weights were one and are no longer, because not all layers that share them get the same 8 bits."""
    kept: dict[int, tuple[Layer, Cast | None]] = {}
    notes = []
    # those that stay in float come first: they keep the weight
    for layer, scheme in sorted(verdict.items(), key=lambda item: isinstance(item[1], Scheme)):
        how = scheme.weight if isinstance(scheme, Scheme) else None
        keeper, kept_as = kept.setdefault(id(layer.owner), (layer, how))
        if how != kept_as:
            own = "float" if kept_as is None else kept_as.format.name
            notes.append(f"{layer.name} shared its weight with {keeper.name}, which keeps its own copy in {own}")
    return notes
