"""Bytes of tensors that lie in several places of several files."""

import pytest
import torch

from octavo.errors import OctavoError
from octavo.io import reader
from octavo.io.lineage import Run, Stored
from octavo.io.reader import Reader


@pytest.fixture
def stored(tmp_path):
    """Bytes 10 … 19 of one file, then 0 … 4 of another, which has no more."""
    (tmp_path / "a").write_bytes(bytes(range(100)))
    (tmp_path / "b").write_bytes(bytes(range(200, 205)))
    return Stored(torch.uint8, (Run(tmp_path / "a", 10, 10), Run(tmp_path / "b", 0, 5)))


@pytest.mark.parametrize("ahead", [1, 3, 1 << 27])
def test_any_part(stored, ahead, monkeypatch):
    monkeypatch.setattr(reader, "AHEAD", ahead)
    whole = [*range(10, 20), *range(200, 205)]
    with Reader(stored.runs) as bytes_of:
        for begin in range(16):
            for end in range(begin, 16):
                assert bytes_of.read(stored, begin, end, again=begin % 2 == 0).tolist() == whole[begin:end]


def test_files_are_closed(stored):
    with Reader(stored.runs) as bytes_of:
        bytes_of.read(stored, 0, 15)
        descriptors = list(bytes_of._open.values())
    assert len(descriptors) == 2
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            reader.os.fstat(descriptor)


def test_what_cannot_be_read(stored):
    file = stored.runs[1].file
    file.write_bytes(b"abc")
    with Reader(()) as bytes_of, pytest.raises(OctavoError, match=r"b was cut off while it was read"):
        bytes_of.read(stored, 0, 15)
    file.unlink()
    with Reader(()) as bytes_of, pytest.raises(OctavoError, match=r"b cannot be read \(No such file or directory\)"):
        bytes_of.read(stored, 0, 15)
