"""The output folder: whole or not at all, whatever happens on the way."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.errors import OctavoError
from octavo.io import folder
from octavo.io.folder import atomic_folder, check_output, did_you_mean


def checkpoint(path, text="old"):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "weights.txt").write_text(text)
    return path


def snapshot(root):
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in Path(root).rglob("*")}


def test_appears_whole_and_only_at_the_end(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with atomic_folder(out) as place:
        assert place.is_dir()
        assert place.parent == out.parent  # the same filesystem
        assert place.name.startswith(".")
        (place / "sub").mkdir()
        (place / "sub" / "x").write_text("x")
        assert not out.exists()
    assert snapshot(out) == {"sub": None, "sub/x": b"x"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as place:
        (place / "x").write_text("x")
    assert snapshot(tmp_path / "out") == {"x": b"x"}


def test_modes_follow_the_umask(tmp_path):
    with atomic_folder(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_name_of_the_greatest_length(tmp_path):
    out = tmp_path / ("n" * 255)
    with atomic_folder(out):
        pass
    assert out.is_dir()
    with pytest.raises(OctavoError, match="cannot be"), atomic_folder(tmp_path / ("n" * 256)):
        pass


def write_and_raise(place, error, size=1):
    (place / "x").write_bytes(b"x" * size)
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path, error, force):
    out = checkpoint(tmp_path / "out") if force else tmp_path / "new" / "out"
    before = snapshot(tmp_path)
    with pytest.raises(error), atomic_folder(out, force) as place:
        write_and_raise(place, error)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_and_the_space(tmp_path, code):
    words = r"out: the disk is full; 3 kB had been written .* free"
    with pytest.raises(OctavoError, match=words) as caught, atomic_folder(tmp_path / "out") as place:
        write_and_raise(place, OSError(code, os.strerror(code)), 3000)
    assert isinstance(caught.value.__cause__, OSError)
    assert snapshot(tmp_path) == {}


def test_a_full_disk_told_only_in_words(tmp_path):
    """Rust (safetensors) raises its own error with the system's text in it."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(OctavoError, match="the disk is full"), atomic_folder(tmp_path / "out"):
        Path("/dev/full").write_bytes(b"x" * 100000)
    with pytest.raises(OctavoError, match="the disk is full"), atomic_folder(tmp_path / "out"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_disk_that_is_full_when_flushed(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", fsync)
    with pytest.raises(OctavoError, match="the disk is full"), atomic_folder(tmp_path / "out") as place:
        save_file({"w": torch.ones(4)}, place / "model.safetensors")
    assert snapshot(tmp_path) == {}


def test_ctrl_c_is_never_mistaken_for_a_full_disk(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out"):
        raise KeyboardInterrupt from full


def test_force_replaces_a_checkpoint(tmp_path):
    out = checkpoint(tmp_path / "out")
    with pytest.raises(OctavoError, match=r"not empty.*--force"):
        check_output(out)
    with atomic_folder(out, force=True) as place:
        assert (out / "weights.txt").read_text() == "old"
        (place / "weights.txt").write_text("new")
    assert snapshot(tmp_path) == {"out": None, "out/weights.txt": b"new"}


def test_force_through_a_link_replaces_what_it_points_to(tmp_path):
    real = checkpoint(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to(real)
    with atomic_folder(tmp_path / "out", force=True) as place:
        (place / "weights.txt").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (real / "weights.txt").read_text() == "new"


def test_the_old_folder_comes_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    out = checkpoint(tmp_path / "out")
    before, rename, calls = snapshot(tmp_path), os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", second_fails)
    with pytest.raises(OctavoError, match="Input/output error"), atomic_folder(out, force=True):
        pass
    assert snapshot(tmp_path) == before


def test_what_appears_in_the_meantime_is_not_overwritten(tmp_path):
    with pytest.raises(OctavoError, match="not empty"), atomic_folder(tmp_path / "out"):
        checkpoint(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / "weights.txt").read_text() == "theirs"


def test_force_refuses_what_is_no_checkpoint(tmp_path, monkeypatch):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years of work")
    with pytest.raises(OctavoError, match="does not look like a checkpoint"):
        check_output(thesis, force=True)
    checkpoint(tmp_path / "clone")
    (tmp_path / "clone" / ".git").mkdir()
    with pytest.raises(OctavoError, match="git repository"):
        check_output(tmp_path / "clone", force=True)
    home = checkpoint(tmp_path / "users" / "me")
    (tmp_path / "users" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    for place, words in ((home, "your home folder"), (home.parent, "around your home"), ("/", "around|mount")):
        with pytest.raises(OctavoError, match=words):
            check_output(place, force=True)
    here = checkpoint(tmp_path / "here" / "deep")
    monkeypatch.chdir(here)
    for place in (".", "..", here):
        with pytest.raises(OctavoError, match="current folder"):
            check_output(place, force=True)
    assert (here / "weights.txt").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OctavoError, match="is a file"):
            check_output(out)
        with pytest.raises(OctavoError, match="is a file"):
            check_output(out, force=True)
    for bad in ("", "a\0b"):
        with pytest.raises(OctavoError, match="name"):
            check_output(bad)


def test_did_you_mean(tmp_path):
    (tmp_path / "Llama-8B").mkdir()
    assert did_you_mean(tmp_path / "llama-8b-") == f" Did you mean {tmp_path / 'Llama-8B'}?"
    assert did_you_mean(tmp_path / "zzz") == ""
    assert did_you_mean(tmp_path / "no" / "such") == ""


SLOW_WRITER = """
import sys, time
from octavo.io.folder import atomic_folder
with atomic_folder(sys.argv[1], force=True) as place:
    (place / "part").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_real_signal_in_the_middle_of_writing(tmp_path, number, code, times):
    out = checkpoint(tmp_path / "out")
    before = snapshot(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "writing\n"
    assert len(snapshot(tmp_path)) > len(before)
    start = time.monotonic()
    for _ in range(times):  # the impatient press twice; the second may hit Python on its way out
        process.send_signal(number)
    assert process.wait(timeout=20) in ((code,) if times == 1 else (code, -number))
    process.stdout.close()
    assert time.monotonic() - start < 10
    assert snapshot(tmp_path) == before


def test_what_is_resumable_stays_until_it_is_whole(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(KeyboardInterrupt), folder.resumable_folder(out) as place:  # noqa: PT012
        (place / "x").write_text("x")
        raise KeyboardInterrupt
    assert not out.exists()
    assert snapshot(folder.unfinished(out)) == {"x": b"x"}
    with folder.resumable_folder(out) as place:
        assert snapshot(place) == {"x": b"x"}
        (place / "y").write_text("y")
    assert snapshot(out) == {"x": b"x", "y": b"y"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_what_is_resumable_replaces_with_force_only(tmp_path):
    out = checkpoint(tmp_path / "out")
    with pytest.raises(OctavoError, match="not empty"), folder.resumable_folder(out):
        pytest.fail("not reached")
    with folder.resumable_folder(out, force=True) as place:
        (place / "x").write_text("new")
        assert (out / "weights.txt").read_text() == "old"
    assert snapshot(out) == {"x": b"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_resumable_may_have_a_long_name(tmp_path):
    for name in ("n" * 255, "é" * 127, "m" * 254):
        with folder.resumable_folder(tmp_path / name) as place:
            (place / "x").write_text("x")
        assert snapshot(tmp_path / name) == {"x": b"x"}
    assert folder.unfinished(tmp_path / ("n" * 255)) != folder.unfinished(tmp_path / ("m" * 255))


def test_room_counts_what_is_written(tmp_path, monkeypatch):
    out = tmp_path / "a" / "out"
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: folder.shutil._ntuple_diskusage(10**7, 10**7, 10**6))
    folder.check_room(out, 10**6)
    with pytest.raises(OctavoError, match=r"will have 1\.5 MB, of which 0 bytes are written, and the disk has 1 MB"):
        folder.check_room(out, 1_500_000)
    folder.unfinished(out).mkdir(parents=True)
    (folder.unfinished(out) / "x").write_bytes(b"x" * 600_000)
    folder.check_room(out, 1_500_000)
