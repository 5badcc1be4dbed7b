"""Quantize a checkpoint that is larger than the memory: from file to file, never a model in between.

The architecture is built on the meta device, where it has shapes and no numbers. There every rule is decided, every
layer swapped, and every tensor of the folder to come has its name, dtype and shape before one byte is read. Then the
numbers pass by in strips of rows: read, quantized, written. The tensors are bit for bit those of
``open_model``, ``quantize_``, ``save``. A run that was killed is gone on with by running it again.
"""

import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.core.granularity import scale_shape
from octavo.core.qtensor import QTensor
from octavo.core.records import to_json
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError
from octavo.io import checkpoint, huggingface, shards
from octavo.io.folder import check_output, check_room, resumable_folder
from octavo.io.lineage import Traced, trace
from octavo.io.reader import Reader
from octavo.io.shards import Arrangement
from octavo.io.strips import Eight, Kept, Pieces, Rows, Strip, Unit
from octavo.nn import swap
from octavo.nn.swap import Layer
from octavo.ptq.quantize import LayerReport, Summary, no_smaller
from octavo.ptq.rules import Rules, as_rules, assign
from octavo.ptq.stacks import stacks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_THREADS = 4  # more are faster than any disk
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
    units: "Sequence[Unit]"
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
                Reader([run for unit in left for run in unit.runs]) as reader,
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


def _done_in_order(strips: Iterable[Strip]) -> Generator[tuple[Strip, Pieces], None, None]:
    """The strips with what came of them, a few of them done at the same time.

    By several threads of one each: they never wait for each other, as those that share one strip do.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, MOST_THREADS), initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[tuple[Strip, Future[Pieces]]] = deque()
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
) -> list[Unit]:
    """Every tensor of the folder in one unit, in the order in which the files hold what they are made of."""
    outputs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in told.tensors.items()}
    eight = {name: layer for layer, _ in chosen for name in layer.names}
    own = {
        layer: {name: traced.of(f"{layer.name}.{name}") for name in layer.module.state_dict()} for layer, _ in chosen
    }
    stacked: dict[Layer, tuple[Rows, ...]] = {}
    for stack in stacks(chosen):
        members = tuple(rows for layer in stack if (rows := Rows.of(layer, own[layer])) is not None)
        stacked |= dict.fromkeys(stack, members)
    units: list[Unit] = []
    left = dict(outputs)
    for layer, scheme in chosen:
        made = {name: left.pop(name) for name in outputs if _is_code(name, layer)}
        weight = tuple(run for name, stored in own[layer].items() if name != "bias" for run in stored.runs)
        units.append(Eight(made, weight, layer, scheme, told.layout, own[layer], stacked.get(layer, ())))
    for name, shape in left.items():
        parent = name.rpartition(".")[0]
        if name not in floats:
            raise OctavoError(f"{name} is a tensor that cannot be streamed; quantize without --stream")
        stored = traced.of(name)
        units.append(Kept({name: shape}, stored.runs, stored, parent if parent in eight else None))
    return sorted(units, key=lambda unit: [(run.file.name, run.offset) for run in unit.runs[:1]])


def _is_code(name: str, layer: Layer) -> bool:
    parent, _, part = name.rpartition(".")
    return parent in layer.names and part != "bias"


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
