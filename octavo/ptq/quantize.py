"""Quantize a model in place, and say what was done.

Everything that can go wrong is looked for first, over the whole model, so that a model is never left half quantized.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from octavo.core.cast import sqnr
from octavo.core.qtensor import QTensor
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError
from octavo.nn import linear, swap
from octavo.nn.swap import Layer
from octavo.ptq.rules import Rules, assign

T = TypeVar("T")
#: Wraps an iterable to show progress: (items, what is being done) → the same items.
Track = Callable[[list[T], str], Iterable[T]]


@dataclass(frozen=True)
class LayerReport:
    """One layer: its scheme in words (None if left alone; ``reason`` says why), bytes, and the weight's SQNR in dB."""

    name: str
    kind: str
    scheme: str | None
    reason: str
    bytes_before: int
    bytes_after: int
    sqnr: float | None = None


@dataclass(frozen=True)
class Summary:
    """What ``quantize_`` did: every layer with weights, the model's bytes before and after, the seconds it took."""

    layers: list[LayerReport]
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: list[str] = field(default_factory=list)

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
            rows.setdefault((layer.scheme is None, layer.scheme or layer.reason, layer.kind), []).append(layer)
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


def quantize_(model: nn.Module, rules: Rules, *, track: "Track[str] | None" = None) -> Summary:
    """Replace the model's linear layers by 8-bit ones, in place.

    ``rules``: a scheme or its name for all but the output head; ``{name pattern: scheme or None}``; or a list of
    ``Rule``. ``track`` wraps the loop to show progress. Raises ``OctavoError`` before anything is changed if a rule or
    scheme matches nothing, nothing is left to quantize, or a weight is on the meta device or holds NaN or Inf.
    """
    started = time.perf_counter()
    verdict = check(model, rules)
    chosen = [(layer, scheme) for layer, scheme in verdict.items() if isinstance(scheme, Scheme)]
    before = model_bytes(model)
    reports = {x.name: LayerReport(x.name, x.kind, None, str(verdict[x]), x.nbytes, x.nbytes) for x in verdict}
    notes = _notes(model, [layer for layer, _ in chosen])
    owners = Counter(id(layer.owner) for layer, _ in chosen)
    shared: dict[tuple[int, Scheme], tuple[Layer, QTensor]] = {}
    names, queue = [layer.name for layer, _ in chosen], deque(chosen)
    del verdict, chosen  # from here on only the queue keeps float weights alive, each until its turn
    for _ in track(names, "quantizing") if track else names:
        layer, scheme = queue.popleft()
        new = linear.from_float(layer.weight, getattr(layer.module, "bias", None), scheme, layer.transposed)
        if owners[id(layer.owner)] > 1:  # one weight under several layers stays one weight
            _, weight = shared.setdefault((id(layer.owner), scheme), (layer, new.quantized_weight))
            new = linear.QuantizedLinear(weight, new.bias, scheme, layer.transposed)
        quality = sqnr(layer.weight, new.weight)
        swap.replace(model, layer, new)
        after = sum(t.nbytes for t in new.buffers())
        reports[layer.name] = LayerReport(layer.name, layer.kind, describe(scheme), "", layer.nbytes, after, quality)
    return Summary(list(reports.values()), before, model_bytes(model), time.perf_counter() - started, notes)


def check(model: nn.Module, rules: Rules) -> dict[Layer, Scheme | str]:
    """What ``quantize_`` would do to every layer: its scheme, or why it is left alone. Raises what it would raise."""
    verdict = assign(model, swap.layers(model), rules)
    for layer, scheme in verdict.items():
        if isinstance(scheme, Scheme):
            _check(layer, scheme)
    return verdict


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({(t.data_ptr() or id(t), t.nbytes): t.nbytes for t in tensors}.values())


def _check(layer: Layer, scheme: Scheme) -> None:
    if layer.weight.is_meta:
        raise OctavoError(f"{layer.name} is on the meta device and holds no numbers; load the weights first")
    for name, tensor in (("weight", layer.weight), ("bias", getattr(layer.module, "bias", None))):
        if tensor is None or tensor.numel() == 0:
            continue
        if not all(edge.isfinite() for edge in torch.aminmax(tensor.detach())):  # one pass; NaN wins both
            bad = int((~tensor.isfinite()).sum())
            raise OctavoError(
                f"{layer.name}.{name} holds {bad} NaN or Inf among its {tensor.numel()} values: the checkpoint is "
                f"damaged; mend it, or leave the layer alone with a rule for {layer.name!r}"
            )
    rows, cols = layer.weight.shape
    try:
        scheme.weight.granularity.block((cols, rows) if layer.transposed else (rows, cols))
        if scheme.input is not None:
            scheme.input.granularity.block((1, rows if layer.transposed else cols))
    except OctavoError as error:
        raise OctavoError(f"{layer.name}: {error}") from error


def _notes(model: nn.Module, chosen: list[Layer]) -> list[str]:
    tables = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    return [
        f"{x.name} shared its weight with {tables[id(x.owner)]}, which keeps its own copy in float"
        for x in chosen
        if id(x.owner) in tables
    ]
