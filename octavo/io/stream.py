"""Quantize a checkpoint that is larger than the memory: from file to file, never a model in between.

The architecture is built on the meta device, where it has shapes and no numbers. There every rule is decided, every
layer swapped, and every tensor of the folder to come has its name, dtype and shape before one byte is read. Then the
numbers pass by in strips of rows: read, quantized, written. The tensors are bit for bit those of
``open_model``, ``quantize_``, ``save``. A run that was killed is gone on with by running it again.
"""

import copy
import hashlib
import json
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from octavo.calibration.minmax import MinMax
from octavo.core.cast import quantize_scaled, quantize_unchecked
from octavo.core.granularity import PerTensor, reduce_blocks, scale_shape
from octavo.core.qtensor import QTensor
from octavo.core.records import to_json
from octavo.core.scaling import Constant, Current, scale_of_range
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError
from octavo.io import checkpoint, compressed_tensors, huggingface, shards
from octavo.io.folder import check_output, check_room, resumable_folder
from octavo.io.lineage import Run, Stored, Traced, trace
from octavo.io.shards import Arrangement, Shape
from octavo.nn import swap
from octavo.nn.linear import QuantizedLinear
from octavo.nn.swap import Layer
from octavo.ptq.quantize import LayerReport, Summary, no_smaller
from octavo.ptq.rules import Rules, as_rules, assign
from octavo.ptq.stacks import stacks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRIP = 1 << 23  # bytes of a weight that are quantized at a time
MOST_THREADS = 4  # more are faster than any disk
AHEAD = 1 << 27  # bytes that the system is asked to have read by the time they are wanted
SHARD = 5_000_000_000  # bytes of tensors in a file, as ``checkpoint.save`` has it
#: Tells of bytes that have been read; those of an earlier run at once.
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Plan:
    """What will become of a checkpoint: which layer gets which scheme, in which layout, and why that one."""

    source: Traced
    verdict: dict[Layer, Scheme | str]
    layout: str
    why: str
    told: checkpoint.Contents
    units: "Sequence[_Unit]"
    tokenizer: "PreTrainedTokenizerBase | None"

    @property
    def bytes_before(self) -> int:
        """Bytes that are to be read."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def bytes_after(self) -> int:
        """Bytes of the tensors that are to be written."""
        return sum(tensor.nbytes for tensor in self.told.tensors.values())

    def reports(self) -> list[LayerReport]:
        """Every layer with weights, with its bytes before and after."""
        modules = dict(self.source.model.named_modules(remove_duplicate=False))
        return [
            LayerReport(x.name, x.kind, describe(v), "", x.nbytes, sum(t.nbytes for t in modules[x.name].buffers()))
            if isinstance(v, Scheme)
            else LayerReport(x.name, x.kind, None, v, x.nbytes, x.nbytes)
            for x, v in self.verdict.items()
        ]


@dataclass(frozen=True)
class Result:
    """What a run did: bytes read by an earlier one and by this one, seconds of this one, files of tensors written."""

    resumed: int
    read: int
    seconds: float
    files: list[str]


def quantize_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rules: Rules,
    layout: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
    advance: Advance = lambda count: None,
    shard: int = SHARD,
) -> Summary:
    """Quantize the checkpoint folder ``source`` (or a hub name) into the folder ``out`` without building the model.

    For weight-only and dynamic schemes: what looks at data needs ``open_model``, ``quantize_`` and ``save``, whose
    folder is the same bit for bit. Memory stays that of a few strips, however large the checkpoint; files of the result
    have ``shard`` bytes. ``advance`` is told of bytes as they are read, in all those of the source. If a run is killed,
    the same call goes on with it. Arguments and errors are those of ``plan`` and ``run``.

    The summary names every layer but no SQNR: measuring it takes ten times as long as quantizing.
    """
    made = plan(source, rules, layout, dtype)
    return summary(made, run(made, out, force, advance, shard))


def summary(made: Plan, result: Result) -> Summary:
    """What was done, as ``quantize_`` says it."""
    layers = made.reports()
    notes = no_smaller(layers)
    if made.layout == "octavo":
        notes.append(f"written in Octavo's own layout, which only octavo.load opens{': ' * bool(made.why)}{made.why}")
    if result.resumed:
        notes.append(f"gone on with after {result.resumed / 1e6:.1f} MB that an earlier run had read")
    return Summary(layers, made.bytes_before, made.bytes_after, result.seconds, notes)


def plan(source: str | os.PathLike[str], rules: Rules, layout: str = "auto", dtype: torch.dtype | None = None) -> Plan:
    """Decide everything from headers and config. ``rules`` as for ``quantize_``, ``dtype`` as for ``open_model``.

    Raises ``OctavoError`` for what is no folder of safetensors, damaged files, rules that match nothing or want data,
    schemes that need calibration, a layout that cannot hold a layer, and tensors that transformers computes while it
    loads.
    """
    folder = huggingface.locate(source)
    if folder.is_file():
        raise OctavoError(
            f"{folder} is a GGUF file, and only safetensors can be streamed; quantize it without --stream"
        )
    for rule in as_rules(rules):
        if rule.smooth is not None or rule.rounding != "nearest":
            raise OctavoError(
                f"the rule {rule} smooths or rounds by data, for which the model has to run. Leave that out, or "
                "quantize without --stream"
            )
    traced = trace(folder, dtype)
    model = traced.model
    verdict = assign(model, swap.layers(model), rules)
    chosen = [(layer, scheme) for layer, scheme in verdict.items() if isinstance(scheme, Scheme)]
    for layer, scheme in chosen:
        if scheme.static:
            raise OctavoError(
                f"{layer.name}: {describe(scheme)} needs calibration, for which the model has to run. Choose a dynamic "
                "or a weight-only scheme, or quantize without --stream"
            )
    floats = dict(model.state_dict())
    for layer, scheme in chosen:
        swap.replace(model, layer, layer.eight_bit.replacing(layer.module, _blank(layer, scheme), scheme))
    possible, why = checkpoint.layout_for(model)
    told = checkpoint.contents(model, possible if layout == "auto" else layout)
    units = _units(traced, floats, chosen, told)
    return Plan(traced, verdict, told.layout, why, told, units, huggingface.tokenizer_or_warning(folder))


def run(
    made: Plan,
    out: str | os.PathLike[str],
    force: bool = False,
    advance: Advance = lambda count: None,
    shard: int = SHARD,
) -> Result:
    """Write the folder ``out``, whole or not at all; what a killed run has written of it is kept and gone on with.

    ``force`` replaces the checkpoint in ``out``, and gives up an unfinished run of other rules or another source.
    ``shard``: bytes of tensors a file. Raises ``OctavoError`` on NaN or Inf in a weight, on a source that changes
    meanwhile, on a full disk.
    """
    started = time.perf_counter()
    layout = shards.arrange([unit.outputs for unit in made.units], made.told.file, shard)
    identity = _identity(made, layout)
    resumed = read = 0
    check_output(out, force)
    check_room(out, layout.nbytes)
    with resumable_folder(out, force) as unfinished, shards.writing(unfinished, layout, identity, force) as writer:
        checkpoint.write_description(made.source.model, made.told, unfinished, made.tokenizer)
        resumed = sum(unit.nbytes for unit in made.units[: writer.done])
        advance(resumed)
        left = made.units[writer.done :]
        try:
            with (
                _Reader([run for unit in left for run in unit.runs]) as reader,
                closing(_done_in_order(strip for unit in left for strip in unit.strips(reader))) as done,
            ):
                for strip, pieces in done:
                    for name, piece in pieces:
                        writer.append(name, piece)
                    if strip.last:
                        writer.finish_unit()
                    advance(strip.nbytes)
                    read += strip.nbytes
            if _source_identity(made) != identity["source"]:
                raise OctavoError(f"{made.source.folder} was changed while it was read: begin anew")
        except OctavoError:  # the source will not do, however often it is read
            writer.abandon()
            shutil.rmtree(unfinished)
            raise
    return Result(resumed, read, time.perf_counter() - started, list(layout.headers))


#: Rows of outputs, each output's in order.
_Pieces = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Strip:
    """What can be done at a time: bytes to read, what to do, and whether the unit is complete with it."""

    nbytes: int
    work: Callable[[], _Pieces]
    last: bool


def _done_in_order(strips: Iterable[_Strip]) -> Generator[tuple[_Strip, _Pieces], None, None]:
    """The strips with what came of them, a few of them done at the same time.

    By several threads of one each: they never wait for each other, as those that share one strip do.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, MOST_THREADS), initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[tuple[_Strip, Future[_Pieces]]] = deque()
    try:
        for strip in strips:
            waiting.append((strip, pool.submit(strip.work)))
            if len(waiting) > MOST_THREADS:
                first, pieces = waiting.popleft()
                yield first, pieces.result()
        while waiting:
            first, pieces = waiting.popleft()
            yield first, pieces.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what a thread sets for itself is what threads to come begin with


class _Reader:
    """Bytes of files, read by several threads from where they lie; tells the system beforehand what comes next."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._coming = list(reversed(runs))
        self._asked = self._used = 0
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, stored: Stored, begin: int, end: int, again: bool = False) -> Tensor:
        """The bytes from ``begin`` to ``end`` as uint8; those that will be read ``again`` come once more."""
        out = torch.empty(end - begin, dtype=torch.uint8)
        view, filled, passed = out.numpy().data, 0, 0
        for run in stored.runs:
            first, last = max(begin - passed, 0), min(end - passed, run.nbytes)
            if first < last:
                self._read_into(view[filled : filled + last - first], run.file, run.offset + first)
                filled += last - first
            passed += run.nbytes
        if not again:
            self._ask(len(out))
        return out

    def _read_into(self, view: memoryview, file: Path, offset: int) -> None:
        with self._lock:
            descriptor = self._descriptor(file)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise OctavoError(f"{file} was cut off while it was read")
            view, offset = view[count:], offset + count

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            try:
                self._open[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise OctavoError(f"{file} cannot be read ({error.strerror})") from None
        return self._open[file]

    def _ask(self, used: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        with self._lock:
            self._used += used
            while self._coming and self._asked < self._used + AHEAD:
                run = self._coming.pop()
                part = min(run.nbytes, AHEAD)
                if part < run.nbytes:
                    self._coming.append(Run(run.file, run.offset + part, run.nbytes - part))
                os.posix_fadvise(self._descriptor(run.file), run.offset, part, os.POSIX_FADV_WILLNEED)
                self._asked += part


@dataclass(frozen=True)
class _Unit(ABC):
    """Tensors that are written together, and what is read for them."""

    outputs: Mapping[str, Shape]
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(run.nbytes for run in self.runs)

    @abstractmethod
    def strips(self, reader: _Reader) -> Iterator[_Strip]:
        """What is to be done, at least one."""


@dataclass(frozen=True)
class _Kept(_Unit):
    """A tensor that stays what it is, in the model's dtype; ``layer`` is the one that becomes 8-bit around it."""

    stored: Stored
    layer: str | None

    def strips(self, reader: _Reader) -> Iterator[_Strip]:
        """The tensor, so many bytes at a time."""
        size = self.stored.nbytes
        for begin in range(0, max(size, 1), STRIP):
            end = min(begin + STRIP, size)
            yield _Strip(end - begin, partial(self._copy, reader, begin, end), end == size)

    def _copy(self, reader: _Reader, begin: int, end: int) -> _Pieces:
        ((name, (dtype, _)),) = self.outputs.items()
        part = reader.read(self.stored, begin, end).view(self.stored.dtype).to(dtype)
        if self.layer is not None and not bool(part.isfinite().all()):
            raise _not_finite(self.layer, "bias")
        return [(name, part)]


@dataclass(frozen=True)
class _Eight(_Unit):
    """A layer's weight, to become 8 bits.

    ``own``: the float layer's tensors. ``stack``: weights that share one scale with it (``ptq.stacks``).
    """

    layer: Layer
    scheme: Scheme
    layout: str
    own: Mapping[str, Stored]
    stack: "tuple[_Rows, ...]"

    def strips(self, reader: _Reader) -> Iterator[_Strip]:
        """The weight, so many rows at a time, or whole where it does not lie in rows."""
        rows, how = _Rows.of(self.layer, self.own), self.scheme.weight
        if rows is None:
            yield _Strip(self.nbytes, lambda: self._named(self._quantized_whole(reader), True), True)
            return
        block = how.granularity.block(rows.shape)
        step = max(STRIP // max(rows.row_bytes, 1) // block[0], 1) * block[0]
        alone = block[0] < rows.shape[0] or step >= rows.shape[0] or isinstance(how.scale, Constant)
        if alone and not self.stack:
            cast = partial(quantize_unchecked, how=how, storage=rows.dtype)
        else:
            step = max(STRIP // rows.row_bytes, 1)
            scale, zero_point = self._shared_scale(rows, reader)
            cast = partial(quantize_scaled, how=how, scale=scale, zero_point=zero_point)
        for first in range(0, rows.shape[0], step):
            last = min(first + step, rows.shape[0])
            work = partial(self._quantized_rows, reader, rows, first, last, cast)
            yield _Strip((last - first) * rows.row_bytes, work, last == rows.shape[0])

    def _quantized_rows(
        self, reader: _Reader, rows: "_Rows", first: int, last: int, cast: Callable[[Tensor], QTensor]
    ) -> _Pieces:
        return self._named(cast(rows.read(reader, first, last)), first == 0)

    def _quantized_whole(self, reader: _Reader) -> QTensor:
        matrix = _whole(self.layer, self.own, reader)
        return quantize_unchecked(matrix, self.scheme.weight, matrix.dtype)

    def _shared_scale(self, rows: "_Rows", reader: _Reader) -> tuple[Tensor, Tensor | None]:
        """The scale of blocks that reach over all rows, for which everything is read once more."""
        how = self.scheme.weight
        if self.stack:
            watcher = MinMax().fresh(PerTensor())
            for member in self.stack:
                for part in member.parts(reader):
                    watcher.update(part)
            return watcher.scale(how, rows.dtype)
        assert isinstance(how.scale, Current)
        low = high = torch.zeros(())
        for at, part in enumerate(rows.parts(reader)):
            least, most = reduce_blocks(part, how.granularity.block(tuple(part.shape)))
            low, high = (torch.minimum(low, least), torch.maximum(high, most)) if at else (least, most)
        work = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return scale_of_range(low.to(work), high.to(work), how.format, how.affine, how.scale.power_of_two, rows.dtype)

    def _named(self, part: QTensor, first: bool) -> _Pieces:
        """The strip's tensors under the names of the layout, and of the layer, which may have several."""
        if not bool(part.scale.isfinite().all()):
            raise _not_finite(self.layer.name, "weight")
        found: dict[str, Tensor | None] = {}
        for name in self.layer.names:
            if self.layout == "octavo":
                found |= {f"{name}.codes": part.codes, f"{name}.scale": part.scale}
                found[f"{name}.zero_point"] = part.zero_point
            else:
                found |= compressed_tensors.tensors(name, QuantizedLinear(part, None, self.scheme))
                if f"{name}.weight_shape" in found:
                    found[f"{name}.weight_shape"] = torch.tensor(self.layer.matrix.shape)
        # what has its whole shape, such as a scale for all rows, comes with every strip
        return [
            (name, tensor.to(self.outputs[name][0]))
            for name, tensor in found.items()
            if tensor is not None and (first or tuple(tensor.shape) != self.outputs[name][1])
        ]


@dataclass(frozen=True)
class _Rows:
    """A matrix whose rows lie in files one after the other, and the dtype the model has it in."""

    stored: Stored
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: Layer, own: Mapping[str, Stored]) -> "_Rows | None":
        """A layer's weight, unless it is computed, turned round, or empty."""
        matrix, stored = layer.matrix, layer.module._parameters.get("weight")
        if stored is None or not matrix.is_contiguous() or not stored.is_contiguous() or not matrix.numel():
            return None
        if matrix.untyped_storage()._cdata != stored.untyped_storage()._cdata:
            return None
        return cls(own["weight"], (matrix.shape[0], matrix.shape[1]), matrix.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the files."""
        return self.shape[1] * self.stored.dtype.itemsize

    def read(self, reader: _Reader, first: int, last: int, again: bool = False) -> Tensor:
        """Some rows, in the model's dtype."""
        part = reader.read(self.stored, first * self.row_bytes, last * self.row_bytes, again)
        return part.view(self.stored.dtype).view(-1, self.shape[1]).to(self.dtype)

    def parts(self, reader: _Reader) -> Iterator[Tensor]:
        """All rows, which will be read again."""
        step = max(STRIP // self.row_bytes, 1)
        for first in range(0, self.shape[0], step):
            yield self.read(reader, first, min(first + step, self.shape[0]), again=True)


def _blank(layer: Layer, scheme: Scheme) -> QTensor:
    """A layer's weight in 8 bits, but for its numbers."""
    matrix, how = layer.matrix, scheme.weight
    shape = (matrix.shape[0], matrix.shape[1])
    block = how.granularity.block(shape)
    counts = scale_shape(shape, block)
    codes = torch.empty(shape, dtype=how.format.code_dtype, device="meta")
    scale = torch.empty(counts, dtype=torch.float32, device="meta")
    zero_point = torch.empty(counts, dtype=torch.int32, device="meta") if how.affine else None
    return QTensor(codes, scale, zero_point, how.format, block, matrix.dtype)


def _units(
    traced: Traced, floats: Mapping[str, Tensor], chosen: Sequence[tuple[Layer, Scheme]], told: checkpoint.Contents
) -> list[_Unit]:
    """Every tensor of the folder in one unit, in the order in which the files hold what they are made of."""
    outputs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in told.tensors.items()}
    eight = {name: layer for layer, _ in chosen for name in layer.names}
    own = {
        layer: {name: traced.of(f"{layer.name}.{name}") for name in layer.module.state_dict()} for layer, _ in chosen
    }
    stacked: dict[Layer, tuple[_Rows, ...]] = {}
    for stack in stacks(chosen):
        members = tuple(rows for layer in stack if (rows := _Rows.of(layer, own[layer])) is not None)
        stacked |= dict.fromkeys(stack, members)
    units: list[_Unit] = []
    left = dict(outputs)
    for layer, scheme in chosen:
        made = {name: left.pop(name) for name in outputs if _is_code(name, layer)}
        weight = tuple(run for name, stored in own[layer].items() if name != "bias" for run in stored.runs)
        units.append(_Eight(made, weight, layer, scheme, told.layout, own[layer], stacked.get(layer, ())))
    for name, shape in left.items():
        parent = name.rpartition(".")[0]
        if name not in floats:
            raise OctavoError(f"{name} is a tensor that cannot be streamed; quantize without --stream")
        stored = traced.of(name)
        units.append(_Kept({name: shape}, stored.runs, stored, parent if parent in eight else None))
    return sorted(units, key=lambda unit: [(run.file.name, run.offset) for run in unit.runs[:1]])


def _is_code(name: str, layer: Layer) -> bool:
    parent, _, part = name.rpartition(".")
    return parent in layer.names and part != "bias"


def _whole(layer: Layer, own: Mapping[str, Stored], reader: _Reader) -> Tensor:
    """A layer's weight matrix, from all of its tensors."""
    module: nn.Module = copy.deepcopy(layer.module).to_empty(device="cpu")
    for name, tensor in module.state_dict().items():
        stored = own[name]
        numbers = reader.read(stored, 0, stored.nbytes, again=name == "bias").view(stored.dtype)
        tensor.copy_(numbers.view(tensor.shape))
    return layer.eight_bit.matrix(module).detach()


def _not_finite(layer: str, part: str) -> OctavoError:
    return OctavoError(
        f"{layer}.{part} holds NaN or Inf: the checkpoint is damaged; mend it, or leave the layer alone with a rule "
        f"for {layer!r}"
    )


def _identity(made: Plan, layout: Arrangement) -> dict[str, str]:
    """What two runs must have in common for one to go on with the other's files."""
    schemes = {x.name: to_json(v) if isinstance(v, Scheme) else None for x, v in made.verdict.items()}
    told = [schemes, made.told.method, {name: header.hex() for name, header in layout.headers.items()}]
    return {"version": metadata.version("octavo"), "source": _source_identity(made), "set of rules": _digest(told)}


def _source_identity(made: Plan) -> str:
    """The source's files: what they are called, how long they are, when they were last changed, what they hold."""
    infos = made.source.infos
    files = sorted({info.file for info in infos.values()})
    states = [(file.name, (state := os.stat(file)).st_size, state.st_mtime_ns) for file in files]
    return _digest([states, [(name, x.dtype, x.shape, x.offset) for name, x in sorted(infos.items())]])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
