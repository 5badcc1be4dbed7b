"""How ``octavo doctor --matrix`` draws the matrix of support: two tables, notes, numbered sources, 100 columns wide."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from octavo.cli.console import Screen

if TYPE_CHECKING:
    from octavo.analysis.support import Here, Support, Table

WIDTH = 100
WORDS = {"native": "yes", "convert": "conv", "emulated": "emul", "none": "no", "unknown": "?"}
HEADINGS = (
    "w: weights only, multiplied in 16 bits. 128 block: FP8 with a scale for every block of 128. "
    "MXFP8: FP8 with a power of two for every 32. other: any other 8-bit format."
)
MEASURED = (
    "> is this machine, with the rate of a product [512 × n] × [n × n] measured now: FP8 formats by torch._scaled_mm, "
    "other by Octavo, which multiplies any pair of 8-bit floats at that rate, those three too."
)


def show(screen: Screen, support: "Support", here: Sequence["Here"]) -> None:
    """Print the matrix; a row of this machine is marked, and measured in the row below it."""
    numbers = {name: i for i, name in enumerate(_sources(support), 1)}
    screen.say(f"Which formats run where, by sources read in {support.checked}; their numbers follow the word.")
    for status, meaning in support.meanings.items():
        _lines(screen, f"{WORDS[status]:4} {meaning}", "     ")
    _lines(screen, HEADINGS)
    for table in (support.hardware, support.software):
        screen.say()
        screen.say(_draw(table, numbers, {place.row: place for place in here}))
    if here:
        screen.say()
        _lines(screen, MEASURED)
    for table in (support.hardware, support.software):
        screen.say()
        screen.say(f"notes on {table.title}", style="bold")
        for note in _notes(table):
            _lines(screen, note, "  ")
    screen.say()
    screen.say("sources", style="bold")
    for name, number in numbers.items():
        _lines(screen, f"{number:2} {support.sources[name].title}", "   ")
        screen.say(f"   {support.sources[name].url}", whole=True)


def document(support: "Support", here: Sequence["Here"]) -> dict[str, Any]:
    """The matrix whole, for machines."""
    return {**asdict(support), "here": [asdict(place) for place in here]}


def _draw(table: "Table", numbers: dict[str, int], here: dict[str, "Here"]) -> object:
    from rich.table import Table as Drawn

    drawn = Drawn(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in (table.title, *table.columns.values()):
        drawn.add_column(name, no_wrap=True)
    for row in table.rows:
        words = [
            f"{WORDS[cell.status]} {','.join(str(numbers[source]) for source in cell.sources)}"
            for cell in row.cells.values()
        ]
        place = here.get(row.name)
        drawn.add_row(f"{'>' if place else ' '} {row.name}", *words, style="bold" if place else None)
        if place:
            rates = [_tera(place.rates[key].gops) if key in place.rates else "-" for key in table.columns]
            drawn.add_row(">   measured, Top/s", *rates, style="bold")
    return drawn


def _tera(gops: float) -> str:
    return f"{gops / 1e3:.3f}" if gops < 1e4 else f"{gops / 1e3:,.0f}"


def _sources(support: "Support") -> Iterable[str]:
    """Names in the order in which a reader meets them."""
    tables = (support.hardware, support.software)
    cells = [cell for table in tables for row in table.rows for cell in row.cells.values()]
    return dict.fromkeys(source for cell in cells for source in cell.sources)


def _notes(table: "Table") -> list[str]:
    """One line a note; columns and rows that share one stand together."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in table.rows:
        for key, cell in row.cells.items():
            if cell.note:
                found.setdefault(cell.note, {}).setdefault(row.name, []).append(table.columns[key])
    where = {note: [f"{row} · {', '.join(columns)}" for row, columns in rows.items()] for note, rows in found.items()}
    return [f"{'; '.join(places)}: {note}" for note, places in where.items()]


def _lines(screen: Screen, text: str, indent: str = "") -> None:
    for line in textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False):
        screen.say(line)
