"""Compiling on first use: the cache, compilers that fail, and what is left behind."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from octavo.errors import OctavoWarning
from octavo.ops import build

needs_library = pytest.mark.skipif(build.library("fake_quantize") is None, reason=build.status("fake_quantize"))
NAME = "fake_quantize"  # of one small source
LINE = """
from octavo.ops import build
print(build.library("fake_quantize") is not None, build.status("fake_quantize"), sep="|")
"""


def start(**environment):
    return subprocess.Popen(
        [sys.executable, "-c", LINE],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def load(tmp_path, monkeypatch):
    """As ``start``, but in this process: from loading with this cache and environment to what there is, and why."""

    def load(warned=False, cache=tmp_path / "cache", **environment):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            patch.setattr(build, "_load", functools.cache(build._load.__wrapped__))
            patch.setattr(build, "_warned", set())
            for variable, value in {"OCTAVO_CACHE": str(cache), **environment}.items():
                patch.setenv(variable, value)
            found, status = build.library(NAME), build.status(NAME)
        assert [warning.category for warning in told] == [OctavoWarning] * warned  # one, though it was asked for twice
        assert all(status in str(warning.message) for warning in told)
        assert "\n" not in status
        return found, status

    return load


def script(path, text):
    """A compiler: it says that it is one, and does ``text`` when it is to compile."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{text}\n')
    path.chmod(0o755)
    return str(path)


def test_switched_off(load):
    assert load(OCTAVO_NATIVE="0") == (None, "no native kernels: OCTAVO_NATIVE=0")


def test_no_compiler(load, tmp_path):
    found, status = load(PATH=str(tmp_path), CC="")
    assert found is None
    assert status == "no native kernels: no C compiler found (CC, cc, gcc, clang)"


BROKEN = {
    "complains": ('echo hello >&2\necho "x.c:1: error: no luck" >&2\nexit 1', "x.c:1: error: no luck"),
    "is silent": ("exit 1", "exit status 1"),
    "makes nothing": ("exit 0", "No such file or directory"),
    "makes garbage": ('for last; do :; done\nhead -c 5000 /dev/urandom | tee "$last"', "invalid ELF header"),
    "is killed": ("kill -9 $$", "exit status -9"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_compiler_that_fails(load, tmp_path, how):
    text, said = BROKEN[how]
    compiler = script(tmp_path / "mycc", text)
    found, status = load(CC=compiler, warned=True)
    assert found is None
    assert status.startswith("no native kernels: ")
    assert said in status
    assert f"(by {compiler}; set CC to a compiler that works, or OCTAVO_NATIVE=0 to do without)" in status
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [b"#!/bin/sh\nexit 1\n", b"\x7f\x00 no program \xff"])
def test_what_is_no_compiler(load, tmp_path, content):
    other = tmp_path / "other"
    other.write_bytes(content)
    other.chmod(0o755)
    assert load(CC=str(other), warned=True)[0] is None


@needs_library
def test_two_processes_compile_at_once(tmp_path):
    cache = tmp_path / "deep" / "cache"
    both = [start(OCTAVO_CACHE=str(cache)) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert told == [(f"True|native kernels: {file}\n", "")] * 2  # nothing is printed behind our back


@needs_library
@pytest.mark.parametrize("spoil", ["writable by others", "a file", "full", "taken"])
def test_a_cache_that_cannot_serve(load, tmp_path, spoil):
    """Foreign folders are not trusted, and a full disk does not stop us: this process compiles for itself."""
    cache, environment = tmp_path / "cache", {}
    if spoil == "a file":
        cache.write_text("")
    else:
        cache.mkdir(mode=0o700)
    if spoil == "writable by others":
        cache.chmod(0o777)
    if spoil == "full":  # for what is written there
        say = 'echo "ld: final link failed: No space left on device" >&2'
        compiler = " ".join(build._compiler(".c"))
        environment["CC"] = script(
            tmp_path / "mycc", f'case "$*" in *{cache}*) {say}; exit 1;; esac\nexec {compiler} "$@"'
        )
    if spoil == "taken":
        (cache / build.status(NAME).rpartition("/")[2]).mkdir()
    before = [] if cache.is_file() else list(cache.iterdir())
    found, status = load(warned=True, **environment)
    assert found is not None
    assert "for this process only" in status
    assert cache.is_file() or list(cache.iterdir()) == before


@needs_library
def test_what_cannot_be_kept_is_loaded_once(load, tmp_path, monkeypatch):
    """Operators would be registered another time."""

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.os, "replace", refuse)
    made = []
    declared = build._declared
    monkeypatch.setattr(build, "_declared", lambda *arguments: made.append(1) or declared(*arguments))
    monkeypatch.setattr(build, "_load", build._load.__wrapped__)
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    found = build._load(NAME)
    assert (made, found.odd) == ([1], True)
    assert found.status == "native kernels: compiled for this process only ([Errno 28] No space left on device)"
    assert list(tmp_path.iterdir()) == []


@needs_library
def test_a_damaged_file_is_made_anew(load, tmp_path):
    """Cut off by a full disk or a crash; loading half of a library would end the process (SIGBUS)."""
    _, status = load()
    (file,) = (tmp_path / "cache").iterdir()
    assert status == f"native kernels: {file}"
    content, made = file.read_bytes(), file.stat().st_ino
    load()
    assert file.stat().st_ino == made
    for damaged in (b"", b"not a library", content[: len(content) // 2]):
        file.unlink()  # what is loaded is mapped
        file.write_bytes(damaged)
        assert load()[1] == status
        assert build._is_whole(file)
    for damaged in (content[: -build.DIGEST], content[:-1], content[:5000] + b"!" + content[5001:]):
        other = tmp_path / "other.so"
        other.write_bytes(damaged)
        assert not build._is_whole(other)


@needs_library
def test_killed_midway(load, tmp_path):
    """Whatever a process leaves that was killed while it compiled is swept later, and harms nobody before."""
    compiler = script(
        tmp_path / "mycc", f"echo $$ > {tmp_path / 'aside'}\nmv {tmp_path / 'aside'} {tmp_path / 'pid'}\nexec sleep 60"
    )
    process = start(CC=compiler, OCTAVO_CACHE=str(tmp_path / "cache"))
    while not (tmp_path / "pid").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    process.communicate()
    (left,) = (tmp_path / "cache").iterdir()
    assert load()[0] is not None
    assert left.exists()  # somebody might be at work there
    old = time.time() - 2 * build.FORGOTTEN
    os.utime(left, (old, old))
    assert load()[0] is not None
    assert not left.exists()


@needs_library
def test_many_threads_ask_at_once(monkeypatch):
    made = []
    of = build._Recipe.of
    monkeypatch.setattr(build._Recipe, "of", lambda *arguments: made.append(1) or of(*arguments))
    build._load.cache_clear()
    threads = [threading.Thread(target=build.library) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


@needs_library
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_torch_and_we_share_one_openmp():
    script = """if True:
        import torch
        from octavo.ops import native
        native.cast(torch.randn(100_000), 3, -6, -448.0, 448.0, "nearest-even", "saturate", False, True, None)
        print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}))
    """
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)  # other tests
    assert ran.stdout.strip() == "1"  # bring scikit-learn's
