"""Files written piece by piece: what safetensors reads back, and what is left of them after a fall."""

import errno
import fcntl
import json
import os

import pytest
import safetensors.torch
import torch

from octavo import OctavoError
from octavo.io import safe_files, shards

TENSORS = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.randn(3, 7, dtype=torch.float64),
    "short": torch.randn(2, 2).bfloat16(),
    "eight": torch.randn(6).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
    "one": torch.tensor(7),
    "none": torch.empty(0, 4),
    "naïve “name”": torch.randn(4, 3),
}
UNITS = [["bytes", "wide"], ["short"], [], ["eight", "flags", "one"], ["none"], ["naïve “name”"]]
IDENTITY = {"source": "a", "rules": "b"}


def arranged(most=10**9):
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    return shards.arrange([{name: shapes[name] for name in unit} for unit in UNITS], "x.safetensors", most)


def write(folder, arrangement, units=None, identity=IDENTITY, anew=False):
    """Write; returns how many units were there already. After ``units`` of them comes an interruption."""
    with shards.writing(folder, arrangement, identity, anew) as writer:
        done = writer.done
        for unit in UNITS[done:units]:
            for name in unit:
                rows = TENSORS[name].reshape(-1)
                for piece in (rows[:2], rows[2:]):
                    writer.append(name, piece)
            writer.finish_unit()
        if units is not None:
            while writer._waiting:
                writer._waiting.popleft().result()
            raise KeyboardInterrupt
    return done


def interrupted(folder, arrangement, units):
    with pytest.raises(KeyboardInterrupt):
        write(folder, arrangement, units)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("most", [1, 60, 250, 10**9])
def test_safetensors_reads_them(tmp_path, most):
    arrangement = arranged(most)
    assert write(tmp_path, arrangement) == 0
    read = {}
    for name, size in arrangement.sizes.items():
        assert (tmp_path / name).stat().st_size == size
        read |= safetensors.torch.load_file(tmp_path / name)
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].view(tensor.shape).double(), tensor.double())
        assert arrangement.slots[name].offset % tensor.dtype.itemsize == 0
    index = tmp_path / "x.safetensors.index.json"
    assert index.exists() == (len(arrangement.sizes) > 1)
    if index.exists():
        told = json.loads(index.read_text())
        assert told["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert all(name in safe_files.header(tmp_path / file) for name, file in told["weight_map"].items())
    assert not (tmp_path / shards.JOURNAL).exists()


def test_units_stay_together_and_shards_are_full():
    arrangement = arranged(60)
    for unit in UNITS:
        assert len({arrangement.slots[name].file for name in unit}) <= 1
    assert len(arrangement.sizes) == 3  # "bytes" and "wide" are too large for one, and stay together


@pytest.mark.parametrize("most", [60, 10**9])
@pytest.mark.parametrize("units", range(len(UNITS)))
def test_going_on(tmp_path, most, units):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    write(tmp_path / "whole", arranged(most))
    interrupted(tmp_path / "parts", arranged(most), units)
    assert write(tmp_path / "parts", arranged(most)) == units
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("most", [60, 10**9])
def test_a_journal_that_ends_anywhere(tmp_path, most):
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", arranged(most))
    interrupted(tmp_path, arranged(most), 5)
    text = (tmp_path / shards.JOURNAL).read_bytes()
    assert text.count(b"\n") == 6
    kept = files_only(tmp_path)
    for end in range(len(text) + 1):
        for name, data in kept.items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / shards.JOURNAL).write_bytes(text[:end])
        assert write(tmp_path, arranged(most)) == max(text[:end].count(b"\n") - 1, 0)
        assert files_only(tmp_path) == files(tmp_path / "whole")
        for path in tmp_path.glob("x*"):
            path.unlink()


def files_only(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_was_damaged_is_written_anew(tmp_path):
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", arranged())
    expected = files(tmp_path / "whole")
    for position in range(0, len(expected["x.safetensors"]), 7):
        place = tmp_path / str(position)
        place.mkdir()
        interrupted(place, arranged(), 5)
        data = bytearray((place / "x.safetensors").read_bytes())
        data[position] ^= 1
        (place / "x.safetensors").write_bytes(data)
        assert write(place, arranged()) <= 5
        assert files(place) == expected


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 50)])
def test_a_missing_or_short_file_is_written_anew(tmp_path, damage):
    interrupted(tmp_path, arranged(60), 6 - 1)
    damage(tmp_path / "x-00001-of-00003.safetensors")
    assert write(tmp_path, arranged(60)) == 0
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", arranged(60))
    assert files_only(tmp_path) == files(tmp_path / "whole")


def test_another_run_is_refused_or_given_up(tmp_path):
    interrupted(tmp_path, arranged(60), 3)
    with pytest.raises(OctavoError, match=r"unfinished run with another rules.*--force"):
        write(tmp_path, arranged(60), identity=IDENTITY | {"rules": "c"})
    assert write(tmp_path, arranged(), identity=IDENTITY | {"rules": "c"}, anew=True) == 0
    assert list(files(tmp_path)) == ["x.safetensors"]


def test_one_process_at_a_time(tmp_path):
    interrupted(tmp_path, arranged(), 3)
    with open(tmp_path / shards.JOURNAL) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OctavoError, match="being written by another process"):
            write(tmp_path, arranged())
    write(tmp_path, arranged())


def test_the_thread_s_errors_arrive(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, arranged())


@pytest.mark.parametrize("rows", [1, 9])
def test_too_few_or_too_many_numbers(tmp_path, monkeypatch, rows):
    arrangement = arranged()
    monkeypatch.setitem(TENSORS, "short", torch.zeros(rows, dtype=torch.bfloat16))
    with pytest.raises(OctavoError, match="short has"):
        write(tmp_path, arrangement)
