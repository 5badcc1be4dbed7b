"""How the command line speaks: results on stdout; progress, notes and errors on stderr.

To a terminal it speaks in fitted tables, with colours and progress bars; into a pipe in plain lines of any length, with
every name in full; with ``--json`` in exactly one JSON document. rich is imported when the first table is drawn.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from octavo.errors import OctavoError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")
PIPE_WIDTH = 100_000  # columns: nothing is ever folded or cut for a reader that is not a terminal
LABEL = 12  # columns for what a fact is called
COLOURS = {"error": "31", "note": "33"}


class Screen:
    """Where a command speaks. ``as_json`` keeps words and tables to itself; ``result`` ends the command's speech."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.seconds: dict[str, float] = {}
        self.written: str | None = None  # what an interruption can no longer undo
        self.kept: str | None = None  # what it leaves for the next run, in words

    def check(self) -> None:
        """Raise ``OctavoError`` at once if what this screen will need is not installed."""
        if not self.as_json or sys.stderr.isatty():
            try:
                import rich  # noqa: F401
            except ImportError:
                raise OctavoError("tables and progress bars need rich: pip install 'octavo[cli]'") from None

    @cached_property
    def out(self) -> "Console":
        """The rich console on stdout."""
        return _console(sys.stdout)

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 for whoever reads a pipe."""
        return self.out.width if sys.stdout.isatty() else 80

    def say(self, thing: Any = "", style: str | None = None, whole: bool = False) -> None:
        """Print text or a rich renderable, unless the answer is to be JSON; ``whole`` lines stay fit to be copied."""
        if self.as_json:
            return
        if sys.stdout.isatty():
            self.out.print(thing, style=style, soft_wrap=whole)
            return
        with self.out.capture() as text:
            self.out.print(thing, style=style)
        for line in text.get().splitlines():
            sys.stdout.write(f"{line.rstrip()}\n")

    def facts(self, facts: Mapping[str, str], style: str | None = None) -> None:
        """Labels with a few words to each, which fold under themselves where the line is short."""
        if self.as_json:
            return
        from rich.table import Table

        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(min_width=LABEL, no_wrap=True)
        grid.add_column(overflow="fold")
        for label, words in facts.items():
            grid.add_row(label, words)
        self.say(grid, style=style)

    def result(self, document: Mapping[str, Any]) -> None:
        """The whole answer for machines, printed only if it is asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(strict(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def track(self, items: list[T], label: str) -> Iterable[T]:
        """The items, with a progress bar on stderr while they are used up, if somebody is there to see it."""
        if not sys.stderr.isatty():
            return items
        from rich import progress

        return progress.track(items, label, console=_console(sys.stderr), transient=True)

    @contextmanager
    def transfer(self, total: int, label: str) -> "Iterator[Callable[[int], object]]":
        """A bar of bytes, with their speed and the time left, which the function that it gives moves on."""
        if not sys.stderr.isatty():
            yield lambda nbytes: None
            return
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=_console(sys.stderr), transient=True) as bars:
            task = bars.add_task(label, total=total)
            yield lambda nbytes: bars.advance(task, nbytes)

    @contextmanager
    def phase(self, name: str, doing: str = "") -> Iterator[None]:
        """Take the time of a part of the work; ``doing`` shows a spinner meanwhile."""
        started = time.perf_counter()
        if doing and sys.stderr.isatty():
            with _console(sys.stderr).status(doing):
                yield
        else:
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def table(*columns: str, right: Iterable[str] = (), fold: Iterable[str] = ()) -> "Table":
    """A table without lines; ``right`` names the columns of numbers, ``fold`` those that may take several lines."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        side: Any = "right" if name in set(right) else "left"
        made.add_column(name, justify=side, no_wrap=name not in set(fold), overflow="fold")
    return made


def tell(word: str, message: object) -> None:
    """One coloured word and a message on stderr; needs nothing but Python."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = f"\x1b[1;{COLOURS[word]}m{word}:\x1b[0m" if colour else f"{word}:"
    print(f"{label} {message}", file=sys.stderr, flush=True)


def strict(value: Any) -> Any:
    """The value as JSON can hold it: infinities and NaN become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def mb(size: int) -> str:
    """Bytes in MB of a million bytes, the number only."""
    millions = size / 1e6
    return f"{millions:,.1f}" if millions >= 1 else f"{millions:.3f}"


def count(number: int, thing: str, several: str | None = None) -> str:
    """``1 layer``, ``2 layers``; ``several`` for what has no plain plural."""
    return f"{number:,} {thing if number == 1 else several or thing + 's'}"


def _console(file: TextIO) -> "Console":
    from rich.console import Console

    width = None if file.isatty() else PIPE_WIDTH
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False)
