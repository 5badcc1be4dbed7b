"""Bytes from files, by several threads, with the system told beforehand what comes next."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.io.lineage import Run, Stored

AHEAD = 1 << 27  # bytes that the system is asked to have read by the time they are wanted


class Reader:
    """Bytes of files, read by several threads from where they lie; tells the system beforehand what comes next."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._coming = list(reversed(runs))
        self._asked = self._used = 0
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Reader":
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
