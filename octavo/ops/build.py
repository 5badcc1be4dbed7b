"""Compiles the kernels on first use and loads them: the CPU's fast paths without a build step.

``cast.c``, ``rows.c``, ``product.c`` and ``linear.c`` make one shared object; each of the other ``LIBRARIES`` is made
when first asked for. The C files know nothing of Python or torch, so whatever ``cc`` the machine has builds one in a
second or two, all at the same time. A shared object needs ``libgomp.so.1``, which torch has loaded under that very name
by the time it is opened: all run on one pool of threads.

A shared object is kept in ``$OCTAVO_CACHE`` (or ``$XDG_CACHE_HOME/octavo``, ``~/.cache/octavo``) under a name that
carries a hash of all it was made from. It is loaded before it gets that name, and ends in a hash of itself: what a full
disk or a crash has cut off is made anew, for mapping such a file would end the process. What cannot be kept there is
compiled for one process.

Everything here is optional. Without a compiler, or with ``OCTAVO_NATIVE=0``, the operators are computed with torch.
``status`` says so; a compiler or a folder that is there and does not serve is worth an ``OctavoWarning``.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.errors import OctavoWarning

FOLDER = Path(__file__).parent
LIBRARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # sources, and the flags of their own
    # each step of scaling rounds
    "native": (("cast.c", "rows.c", "few.c", "product.c", "linear.c"), ("-std=c11", "-ffp-contract=off")),
    "fake_quantize": (("fake_quantize.c",), ("-std=c11", "-ffp-contract=off")),
    # its products are exact: fusing them with a sum changes no result
    "accumulate": (("accumulate.c",), ("-std=c11", "-ffp-contract=fast")),
    "binding": (("binding.cpp",), ("-std=c++17",)),
}
COMPILERS = {".c": ("CC", "cc", "gcc", "clang"), ".cpp": ("CXX", "c++", "g++", "clang++")}
FLAGS = ("-O3", "-fPIC", "-fno-trapping-math")  # floats only convert: traps are of no interest
INSTRUCTION_SETS = ("scalar", "AVX2", "AVX-512", "AVX-512 BF16")  # by octavo_isa()'s numbers
ASIDE = ".tmp"  # how folders are called in which something is being made
FORGOTTEN = 3600.0  # seconds after which nobody is making it any more: a compiler gets ten minutes
DIGEST = hashlib.sha256().digest_size

_lock = threading.Lock()
_warned: set[bool] = set()  # about what: that kernels are not kept, that there are none


@dataclass(frozen=True)
class _Loaded:
    """A library, or None; a line that says which or why not; whether somebody should mend that."""

    library: ctypes.CDLL | None
    status: str
    odd: bool = False


def library(name: str = "native") -> ctypes.CDLL | None:
    """One of ``LIBRARIES``, or None where there are none; the first call compiles. Never raises, but warns once."""
    return _loaded(name).library


def status(name: str = "native") -> str:
    """One line for people: the file in use and its instruction set, or why there is none."""
    return _loaded(name).status


def _loaded(name: str) -> _Loaded:
    with _lock:  # functools.cache alone would let two threads compile
        found = _load(name)
    if found.odd and (about := found.library is None) not in _warned:
        _warned.add(about)  # once: other libraries will meet with the same
        warnings.warn(OctavoWarning(f"{found.status}. `octavo doctor` says what is in use"), stacklevel=3)
    return found


@functools.cache
def _load(name: str) -> _Loaded:
    """Tried in the cache folder, then in a temporary one."""
    if os.environ.get("OCTAVO_NATIVE") == "0":
        return _Loaded(None, "no native kernels: OCTAVO_NATIVE=0")
    suffix = Path(LIBRARIES[name][0][0]).suffix
    what = "kernels" if suffix == ".c" else "operators"
    variable, *usual = COMPILERS[suffix]
    compiler = _compiler(suffix)
    if compiler is None:
        language = "C++" if suffix == ".cpp" else "C"
        return _Loaded(None, f"no native {what}: no {language} compiler found ({', '.join((variable, *usual))})")
    reasons: list[str] = []
    try:
        recipe = _Recipe.of(name, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        reasons.append(_complaint(error))
    else:
        for prepare in (_cache_folder, _temporary_folder):
            try:
                with prepare() as folder:
                    lib, where = recipe.library(folder)
            except (OSError, AttributeError, subprocess.SubprocessError) as error:
                reasons.append(_complaint(error))
            else:
                reasons += [where] if isinstance(where, str) else []
                where = f"compiled for this process only ({reasons[0]})" if reasons else str(where)
                best = f"{INSTRUCTION_SETS[lib.octavo_isa()]}, " if name == "native" else ""
                return _Loaded(lib, f"native {what}: {best}{where}", bool(reasons))
    mend = f"set {variable} to a compiler that works, or OCTAVO_NATIVE=0 to do without"
    return _Loaded(None, f"no native {what}: {reasons[0]} (by {' '.join(compiler)}; {mend})", True)


def _compiler(suffix: str) -> list[str] | None:
    """The compiler's command line so far: ``$CC``, which may carry options, or the first of the usual names."""
    variable, *usual = COMPILERS[suffix]
    for candidate in (os.environ.get(variable, ""), *usual):
        words = candidate.split()
        if words and shutil.which(words[0]):
            return words
    return None


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    """A folder only we write to: what lies in it will run in this process."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("OCTAVO_CACHE") or Path(home, "octavo"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid not in (os.getuid(), 0) or state.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by others")
    _sweep(folder)
    yield folder


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed have left. Others may be sweeping too, or be at work."""
    for left in folder.glob(f"*{ASIDE}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:  # a file that is loaded need not stay
        yield Path(folder)


@dataclass(frozen=True)
class _Recipe:
    """What makes a library: the compiler's command, what is linked, and a hash of these and of the sources."""

    name: str
    command: tuple[str, ...]
    linked: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, name: str, compiler: list[str]) -> "_Recipe":
        """Asks the compiler what it is."""
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
        sources, own = LIBRARIES[name]
        # clang's OpenMP is another library than torch's; gcc's is the same
        command = (*compiler, *FLAGS, *own, "-fopenmp-simd" if b"clang" in version else "-fopenmp")
        linked: tuple[str, ...] = ()
        if name == "binding":
            home = Path(torch.__file__).parent
            command = (*command, f"-I{home / 'include'}")
            linked = (f"-L{home / 'lib'}", "-ltorch_cpu")
        made_from = repr((command, version, platform.machine(), torch.__version__)).encode()
        for part in (*sources, *sorted(path.name for path in FOLDER.glob("*.h"))):
            made_from += (FOLDER / part).read_bytes()
        return cls(name, command, linked, hashlib.sha256(made_from).hexdigest()[:16])

    def library(self, folder: Path) -> tuple[ctypes.CDLL, Path | str]:
        """The library, made unless it is there and whole, with its file in ``folder``, or why it could not stay."""
        path = folder / f"{self.name}-{self.digest}.so"
        if _is_whole(path):
            return _declared(self.name, ctypes.CDLL(str(path))), path
        # aside: others may be making or loading the same, and nobody shall find what is not finished
        with tempfile.TemporaryDirectory(dir=folder, suffix=ASIDE, ignore_cleanup_errors=True) as aside:
            made = self._compiled(Path(aside))
            lib = _declared(self.name, ctypes.CDLL(str(made)))
            try:
                with made.open("ab") as file:  # behind all that is mapped
                    file.write(hashlib.sha256(made.read_bytes()).digest())
                os.replace(made, path)
            except OSError as error:  # it is loaded, and must not be another time
                return lib, _complaint(error)
        return lib, path

    def _compiled(self, aside: Path) -> Path:
        """The shared object, each source by a compiler of its own."""

        def run(*arguments: str | Path) -> None:
            line, calm = [*self.command, *map(str, arguments)], {**os.environ, "LC_ALL": "C"}
            subprocess.run(line, capture_output=True, check=True, timeout=300, env=calm)

        sources = LIBRARIES[self.name][0]
        objects = [aside / f"{source}.o" for source in sources]
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(run, "-c", FOLDER / s, "-o", o) for s, o in zip(sources, objects, strict=True)]
            for task in running:
                task.result()
        made = aside / f"{self.name}.so"
        run("-shared", *objects, *self.linked, "-o", made)
        return made


def _is_whole(path: Path) -> bool:
    """Whether a file is there and ends in the hash of what goes before."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _declared(name: str, lib: ctypes.CDLL) -> ctypes.CDLL:
    """``lib`` with the signatures of its source."""
    pointer, count, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    if name == "binding":
        lib.octavo_bind.argtypes = (pointer, number)
        lib.octavo_bind.restype = None
        return lib
    if name == "accumulate":
        lib.octavo_survey.argtypes = (pointer, count, pointer)
        lib.octavo_survey.restype = None
        lib.octavo_accumulate.argtypes = (*(pointer,) * 3, count, count, pointer, number, number, number)
        lib.octavo_accumulate.restype = None
        return lib
    if name == "fake_quantize":
        lib.octavo_fake_quantize.argtypes = (pointer, number, number)
        lib.octavo_fake_quantize.restype = number
        return lib
    lib.octavo_isa.argtypes = ()
    lib.octavo_isa.restype = number
    lib.octavo_cast.argtypes = (pointer, pointer, pointer, count, number, pointer, number, number)
    lib.octavo_cast.restype = None
    lib.octavo_encode8.argtypes = (pointer, pointer, count, *[number] * 2, real, real, *[number] * 5)
    lib.octavo_encode8.restype = None
    lib.octavo_decode16.argtypes = (pointer, pointer, pointer, count, number)
    lib.octavo_decode16.restype = None
    lib.octavo_quantize_rows.argtypes = (pointer, number, number)
    lib.octavo_quantize_rows.restype = number
    lib.octavo_scale_sums.argtypes = (pointer, number, *[pointer] * 4, number, count, count, number, number)
    lib.octavo_scale_sums.restype = None
    lib.octavo_product.argtypes = (pointer, pointer, number, number)
    lib.octavo_product.restype = number
    return lib


def _complaint(error: Exception) -> str:
    """What went wrong in one line: of a compiler, its first line about an error, as far as there is one."""
    lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "")
    if isinstance(error, subprocess.CalledProcessError):
        return first or f"exit status {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end after {error.timeout:g} seconds"
    return " ".join(str(error).split())
