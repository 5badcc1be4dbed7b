"""Safetensors files written piece by piece, and gone on with where a killed run stopped.

Shapes and dtypes are known before any number is, so headers are written first and every byte's place is fixed. A
journal beside the files has a line for every unit, a few tensors that are written together, with the checksums of their
bytes. Whoever goes on believes the files that were whole, which had been flushed to the disk before the next one was
begun, and reads the last one again: what is not as its checksums say is written anew.
"""

import fcntl
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.io.lineage import DTYPES

JOURNAL = ".journal.jsonl"
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 24  # bytes read at a time to verify
FLUSH = 1 << 28  # bytes after which the disk is asked to begin, so that it has not everything to do at the end
QUEUE = 8  # pieces that may wait for the disk

#: A tensor to come.
Shape = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Slot:
    """Where the bytes of one tensor go."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Arrangement:
    """Which unit goes where: the files' headers and sizes, each tensor's slot, and the index if files are several."""

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    slots: Mapping[str, Slot]
    units: Sequence[Sequence[str]]
    index: Mapping[str, Any] | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the index."""
        return sum(self.sizes.values())

    def file_of(self, unit: int) -> str | None:
        """The one file that the unit is in; None if it has no tensors."""
        return next((self.slots[name].file for name in self.units[unit]), None)


def arrange(units: Sequence[Mapping[str, Shape]], file: str, most: int) -> Arrangement:
    """Deal units out to files of at most ``most`` bytes of data each, or of one unit if that is larger, in order."""
    shards: list[dict[str, Shape]] = [{}]
    room = most
    for unit in units:
        size = sum(_nbytes(shape) for shape in unit.values())
        if size > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1] |= unit
        room -= size
    stem, count = file.removesuffix(".safetensors"), len(shards)
    names = [file] if count == 1 else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    slots: dict[str, Slot] = {}
    for name, shard in zip(names, shards, strict=True):
        headers[name], placed = _header(shard)
        slots |= {tensor: Slot(name, offset, nbytes) for tensor, (offset, nbytes) in placed.items()}
        sizes[name] = len(headers[name]) + sum(nbytes for _, nbytes in placed.values())
    total = sum(slot.nbytes for slot in slots.values())
    index = {
        "metadata": {"total_size": total, "format": "pt"},
        "weight_map": {tensor: slot.file for tensor, slot in slots.items()},
    }
    return Arrangement(headers, sizes, slots, [list(unit) for unit in units], index if count > 1 else None)


class Writer:
    """Writes the units of an arrangement, one after the other, from ``done`` on; a thread of its own does the writing.

    Made by ``writing``.
    """

    def __init__(self, folder: Path, arrangement: Arrangement, journal: "_Journal", done: int) -> None:
        self.done = done
        self._folder, self._arrangement, self._journal = folder, arrangement, journal
        self._pen, self._flusher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._file: tuple[str, int] | None = None
        self._reached: dict[str, int] = {}  # bytes of each of the unit's tensors
        self._sums: dict[str, int] = {}

    def append(self, name: str, piece: Tensor) -> None:
        """The next numbers of a tensor of the unit at hand. They must not change any more."""
        self._submit(self._append, name, piece)

    def finish_unit(self) -> None:
        """The unit is complete."""
        self._submit(self._finish_unit, self.done)
        self.done += 1

    def close(self) -> None:
        """Wait until everything is on the disk."""
        while self._waiting:
            self._waiting.popleft().result()
        self._pen.submit(self._leave_file).result()

    def abandon(self) -> None:
        """Stop as soon as what is being written is."""
        self._pen.shutdown(cancel_futures=True)
        self._flusher.shutdown()
        if self._file is not None:
            os.close(self._file[1])
            self._file = None

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        while len(self._waiting) >= QUEUE or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()  # raises what went wrong
        self._waiting.append(self._pen.submit(work, *arguments))

    # from here on: in the thread

    def _append(self, name: str, piece: Tensor) -> None:
        slot = self._arrangement.slots[name]
        descriptor = self._open(slot.file)
        data = raw_bytes(piece)
        reached = self._reached.get(name, 0)
        if reached + len(data) > slot.nbytes:
            raise OctavoError(f"{name} has more than its {slot.nbytes} bytes; please report this")
        write_at(descriptor, data, slot.offset + reached)
        self._reached[name] = reached + len(data)
        self._sums[name] = zlib.crc32(data, self._sums.get(name, 0))
        self._unflushed += len(data)
        if self._unflushed >= FLUSH and (self._flush is None or self._flush.done()):
            self._await_flush()
            self._flush = self._flusher.submit(os.fsync, descriptor)
            self._unflushed = 0

    def _finish_unit(self, unit: int) -> None:
        names = self._arrangement.units[unit]
        for name in names:
            if self._reached.get(name, 0) != self._arrangement.slots[name].nbytes:
                raise OctavoError(f"{name} has {self._reached.get(name, 0)} bytes only; please report this")
        self._journal.add({"crc": [self._sums.get(name, 0) for name in names]})
        self._reached, self._sums = {}, {}

    def _open(self, name: str) -> int:
        if self._file is None or self._file[0] != name:
            self._leave_file()
            self._file = (name, _open_shard(self._folder / name, self._arrangement, name))
        return self._file[1]

    def _leave_file(self) -> None:
        self._await_flush()
        if self._file is not None:
            os.fsync(self._file[1])
            os.close(self._file[1])
            self._file = None
        self._journal.flush()

    def _await_flush(self) -> None:
        if self._flush is not None:
            self._flush.result()
            self._flush = None


@contextmanager
def writing(
    folder: Path, arrangement: Arrangement, identity: Mapping[str, str], anew: bool = False
) -> Iterator[Writer]:
    """Begin, or go on with, the files of an arrangement; when the block ends well they are whole and the journal gone.

    ``identity``: what a run has to have in common with the one it goes on with, in words. Raises ``OctavoError`` if
    another process is writing there, or if another run has begun there and ``anew`` does not give that up.
    """
    with _Journal(folder / JOURNAL) as journal:
        begun = journal.identity
        different = [word for word in identity if begun is not None and begun.get(word) != identity[word]]
        if different and not anew:
            raise OctavoError(
                f"{folder} holds an unfinished run with another {' and another '.join(different)}. Give the same again "
                "to finish it; to begin anew, remove that folder or use --force"
            )
        if begun is None or different:
            journal.begin(identity)
        done = _verified(folder, arrangement, journal.lines)
        journal.keep(done)
        _remove_others(folder, arrangement)
        writer = Writer(folder, arrangement, journal, done)
        try:
            yield writer
            writer.close()
        finally:
            writer.abandon()
        if arrangement.index is not None:
            name = next(iter(arrangement.headers)).partition("-00001-of-")[0]
            (folder / f"{name}.safetensors.index.json").write_text(json.dumps(arrangement.index, indent=2))
        journal.remove()


class _Journal:
    """A file of JSON lines, held by one process at a time: who began, and then what is done. A torn line is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "_Journal":
        self._file: BinaryIO = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise OctavoError(f"{self.path.parent} is being written by another process; wait for it") from None
        except OSError:  # a filesystem without locks
            pass
        found: list[dict[str, Any]] = []
        self._ends = [0]
        for line in self._file.read().splitlines(keepends=True):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict) or (found and "crc" not in value):
                break
            found.append(value)
            self._ends.append(self._ends[-1] + len(line))
        self.identity: dict[str, Any] | None = found[0] if found else None
        self.lines = found[1:]
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, identity: Mapping[str, str]) -> None:
        """Forget everything."""
        self.lines, self._ends = [], [0]
        self._file.seek(0)
        self._file.truncate()
        self.add(identity)

    def keep(self, count: int) -> None:
        """Forget all but the first lines."""
        del self._ends[count + 2 :]
        self._file.seek(self._ends[-1])
        self._file.truncate()

    def add(self, line: Mapping[str, Any]) -> None:
        """One line more, which outlives the process."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self._ends.append(self._file.tell())

    def flush(self) -> None:
        """Ask the disk to hold it."""
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """It has served."""
        self.path.unlink()


def _verified(folder: Path, arrangement: Arrangement, lines: Iterable[Mapping[str, Any]]) -> int:
    """How many units are done: those of whole files before the last that was begun, and those of it that are right."""
    units = arrangement.units
    told = [line["crc"] for line in lines][: len(units)]
    files = [arrangement.file_of(at) for at in range(len(told))]
    last = next((file for file in reversed(files) if file is not None), None)
    for file in dict.fromkeys(file for file in files if file is not None):
        try:
            descriptor = os.open(folder / file, os.O_RDONLY)
        except OSError:
            return files.index(file)
        try:
            header = arrangement.headers[file]
            whole = os.fstat(descriptor).st_size == arrangement.sizes[file]
            if not whole or os.pread(descriptor, len(header), 0) != header:
                return files.index(file)
            for at in [at for at in range(len(told)) if files[at] == file == last]:
                slots = [arrangement.slots[name] for name in units[at]]
                if any(_checksum(descriptor, slot) != crc for slot, crc in zip(slots, told[at], strict=True)):
                    return at
        finally:
            os.close(descriptor)
    return len(told)


def _checksum(descriptor: int, slot: Slot) -> int:
    value, at, end = 0, slot.offset, slot.offset + slot.nbytes
    while at < end:
        data = os.pread(descriptor, min(CHUNK, end - at), at)
        if not data:
            return -1
        value, at = zlib.crc32(data, value), at + len(data)
    return value


def _remove_others(folder: Path, arrangement: Arrangement) -> None:
    """Shards of a run that was given up."""
    for path in folder.glob("*.safetensors"):
        if path.name not in arrangement.sizes:
            path.unlink()


def _open_shard(path: Path, arrangement: Arrangement, name: str) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, arrangement.sizes[name])
        write_at(descriptor, memoryview(arrangement.headers[name]), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of the bytes, however often the system has to be asked."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(shard: Mapping[str, Shape]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header, and where in the file every tensor begins and how many bytes it has.

    Tensors of wide numbers come first, so that all are aligned.
    """
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed, reached = {}, 0
    for name, (dtype, shape) in sorted(shard.items(), key=lambda item: -item[1][0].itemsize):
        nbytes = _nbytes((dtype, shape))
        told[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [reached, reached + nbytes]}
        placed[name] = (reached, nbytes)
        reached += nbytes
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: (start + at, size) for n, (at, size) in placed.items()}


def _nbytes(shape: Shape) -> int:
    dtype, sizes = shape
    return dtype.itemsize * torch.Size(sizes).numel()
