"""A folder that appears whole or not at all.

Everything is written into a hidden sibling on the same filesystem, flushed to the disk, and moved into place with one
rename. A full disk, Ctrl-C, SIGTERM or any other exception removes the sibling and leaves what was there untouched.
Only a `kill -9` or a power cut can leave something behind: a hidden `.octavo-….partial` (or, within the moment
between two renames, `.octavo-….old` with the folder that was being replaced). Work of hours is not thrown away so
easily: the sibling of a `resumable_folder` has a name that the next run finds again.
"""

import difflib
import errno
import hashlib
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from octavo.errors import OctavoError

MARKERS = ("config.json", "octavo.json")
# what a checkpoint is made of; a folder with anything else, or with folders inside, is somebody's work
CHECKPOINT_FILES = {".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".md"}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_FULL_TEXT = tuple(os.strerror(code).lower() for code in sorted(_DISK_FULL))


@contextmanager
def atomic_folder(out: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it becomes `out`, otherwise it is gone."""
    check_output(out, force)
    target = Path(os.path.realpath(out))
    temporary = target.parent / f".octavo-{uuid.uuid4().hex[:12]}.partial"
    made = [folder for folder in target.parents if not folder.exists()]
    with _sigterm_raises():
        try:
            with _named(out):
                temporary.mkdir(parents=True)
            yield temporary
            _flush(temporary)
            with _named(out):
                _swap(temporary, target, force)
        except BaseException as error:
            with _undisturbed():
                written = _size(temporary)
                shutil.rmtree(temporary, ignore_errors=True)
                for folder in made:
                    with suppress(OSError):
                        folder.rmdir()
            if isinstance(error, Exception) and _disk_full(error):
                free = shutil.disk_usage(_existing(target)).free
                raise OctavoError(
                    f"{out}: the disk is full; {_bytes(written)} had been written and are removed again, which leaves "
                    f"{_bytes(free)} free. Make room or choose another folder."
                ) from error
            raise


@contextmanager
def resumable_folder(out: str | os.PathLike[str], force: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which may hold what an interrupted block left; when the block ends well, it is `out`.

    Whatever ends the block otherwise, the folder stays: `unfinished(out)`.
    """
    check_output(out, force)
    target, temporary = Path(os.path.realpath(out)), unfinished(out)
    with _sigterm_raises():
        try:
            with _named(out):
                temporary.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            with _named(out):
                _swap(temporary, target, force)
        except Exception as error:
            if _disk_full(error):
                raise OctavoError(
                    f"{out}: the disk is full; {_bytes(_size(temporary))} are written and kept in {temporary}. Make "
                    "room and run the same again to go on from there, or remove that folder."
                ) from error
            raise


def unfinished(out: str | os.PathLike[str]) -> Path:
    """Where `resumable_folder(out)` keeps what is not whole yet."""
    target = Path(os.path.realpath(out))
    short = len(os.fsencode(target.name)) <= 200  # a file's name may have 255 bytes
    name = target.name if short else hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]
    return target.parent / f".octavo-{name}.unfinished"


def check_room(out: str | os.PathLike[str], nbytes: int) -> None:
    """Raise ``OctavoError`` if the disk has no room for a `resumable_folder` of that size."""
    place = unfinished(out)
    held = sum(file.stat().st_blocks * 512 for file in place.iterdir()) if place.is_dir() else 0
    free = shutil.disk_usage(_existing(place.parent)).free
    if nbytes > free + held:
        raise OctavoError(
            f"{out} will have {_bytes(nbytes)}, of which {_bytes(held)} are written, and the disk has {_bytes(free)} "
            "free. Make room or choose another folder."
        )


def check_output(out: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse at once what `atomic_folder(out, force)` could not do after hours of work."""
    if not os.fspath(out):
        raise OctavoError("The name of the output folder is empty. Give the folder a name.")
    try:
        target = Path(os.path.realpath(out))
        parent = _existing(target.parent)
        exists, is_folder = target.exists(), target.is_dir()
    except (OSError, ValueError) as error:
        raise OctavoError(f"{os.fspath(out)!r} cannot be a folder ({error}). Choose another name.") from None
    if exists and not is_folder:
        raise OctavoError(f"{out} is a file, not a folder. Choose another name.")
    if not parent.is_dir():
        raise OctavoError(f"{out} cannot be made: {parent} is a file. Choose another name.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OctavoError(f"{out} cannot be made: no permission to write in {parent}. Choose another folder.")
    if exists:
        _check_replaceable(target, out, force)


def did_you_mean(path: str | os.PathLike[str]) -> str:
    """`" Did you mean a or b?"`: the names nearest to a missing path in its parent folder, or `""`."""
    missing = Path(path)
    try:
        names = sorted(entry.name for entry in missing.parent.iterdir())
    except (OSError, ValueError):
        return ""
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(missing.name.lower(), by_lower, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(str(missing.parent / by_lower[name]) for name in near)}?" if near else ""


def _check_replaceable(target: Path, out: str | os.PathLike[str], force: bool) -> None:
    for words, where in (("the current folder", Path.cwd), ("your home folder", Path.home)):
        with suppress(OSError, RuntimeError):  # neither needs to exist
            place = where().resolve()
            if target == place or target in place.parents:
                around = "" if target == place else "a folder around "
                raise OctavoError(f"{out} is {around}{words} and will not be replaced. Name a folder inside it.")
    if os.path.ismount(target):
        raise OctavoError(f"{out} is a mount point, which cannot be replaced as a whole. Name a folder inside it.")
    try:
        names = {entry.name for entry in target.iterdir()}
    except OSError as error:
        raise OctavoError(f"{out} cannot be read ({error.strerror}). Choose another folder.") from None
    if not names:
        return
    if not force:
        raise OctavoError(f"{out} exists and is not empty. Choose another folder, or replace it with --force.")
    if ".git" in names:
        raise OctavoError(f"{out} holds a git repository and will not be replaced. Choose another folder.")
    foreign = sorted(entry.name for entry in target.iterdir() if entry.is_dir() or entry.suffix not in CHECKPOINT_FILES)
    if foreign and names.intersection(MARKERS):
        raise OctavoError(
            f"{out} holds more than a checkpoint ({foreign[0]}) and will not be replaced, not even with --force. "
            "Choose another folder, or move that away."
        )
    if not names.intersection(MARKERS):
        raise OctavoError(
            f"{out} does not look like a checkpoint (it holds neither {' nor '.join(MARKERS)}) and will not be "
            "replaced, not even with --force. Choose another folder, or remove it yourself."
        )


def _swap(temporary: Path, target: Path, force: bool) -> None:
    """Move `temporary` to `target`; an older folder there leaves only once the new one is in its place."""
    with _undisturbed():
        if not (target.exists() and any(target.iterdir())):
            os.replace(temporary, target)  # on nothing, or on an empty folder
            _flush_folder(target.parent)
            return
        check_output(target, force)  # something may have appeared there while the work was done
        old = target.parent / f".octavo-{uuid.uuid4().hex[:12]}.old"
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            os.rename(old, target)
            raise
        _flush_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Ask the disk to really hold every file and folder below `folder`."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(place, name)
            if os.path.islink(path):
                continue
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(place))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems cannot do this for a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(out: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the system's refusal (read-only disk, name too long, …) into an error that names `out`."""
    try:
        yield
    except OSError as error:
        if _disk_full(error):
            raise
        raise OctavoError(f"{out} cannot be written ({error.strerror}). Choose another folder.") from error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C does, unless somebody else handles it already."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not ours:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    with ExitStack() as stack:
        stack.callback(_raise_signals, held)
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda number, _: held.append(number))
            stack.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
        yield


def _raise_signals(numbers: list[int]) -> None:
    for number in numbers:
        signal.raise_signal(number)


def _disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one behind it, is a full disk; Rust and C++ writers only say so in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if isinstance(error, Exception) and any(text in str(error).lower() for text in _DISK_FULL_TEXT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _existing(path: Path) -> Path:
    """The nearest folder (or file) on the way up that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
