"""Which formats which hardware and software accelerate: read from ``support.json``, where every cell has a source.

A cell says what becomes of a format there, in one of five words (``support.json`` explains them), never more than its
sources say. A hardware row knows this machine by ``here``: names of which one must be present, a name of several parts
(``avx512_bf16+avx512_vnni``) if all its parts are. The CPU rows stand in order: a later one can what the earlier can.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from octavo.analysis import machine
from octavo.errors import OctavoError

Status = Literal["native", "convert", "emulated", "none", "unknown"]
FILE = Path(__file__).with_suffix(".json")

#: Column of the hardware table, and the rate of ``machine.measure`` that shows it. MXFP8 is not measured.
MEASURED = {
    "fp16": "FP16",
    "bf16": "BF16",
    "int8": "INT8 → INT32",
    "e4m3fn": "FP8, torch._scaled_mm",
    "e5m2": "E5M2, torch._scaled_mm",
    "e4m3fnuz": "E4M3FNUZ, torch._scaled_mm",
    "other": "FP8 → FP32, ours",
}


@dataclass(frozen=True)
class Cell:
    """What becomes of one format in one place, who says so, and what the word alone would hide."""

    status: Status
    sources: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One piece of hardware or software; ``cells`` by column."""

    name: str
    kind: Literal["gpu", "accelerator", "cpu", "software"]
    here: tuple[str, ...]
    cells: dict[str, Cell]

    def is_here(self, present: set[str]) -> bool:
        """Whether a machine that has these flags and architectures is one of this row."""
        return any(present.issuperset(name.split("+")) for name in self.here)


@dataclass(frozen=True)
class Table:
    """Rows under columns; ``columns`` holds the headings."""

    title: str
    columns: dict[str, str]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Source:
    """Where a statement can be read."""

    title: str
    url: str


@dataclass(frozen=True)
class Support:
    """The whole matrix, and when its sources were read."""

    checked: str
    meanings: dict[Status, str]
    hardware: Table
    software: Table
    sources: dict[str, Source]


@dataclass(frozen=True)
class Here:
    """The row of this machine, and its measured rates by column; a column without one was not multiplied."""

    row: str
    device: str
    rates: dict[str, machine.Rate]


@cache
def load() -> Support:
    """The matrix in ``support.json``."""
    return parse(json.loads(FILE.read_text(encoding="utf8")))


def parse(document: Mapping[str, Any]) -> Support:
    """The matrix in a document; raises ``OctavoError`` unless every cell has a known word and known sources."""
    sources = {name: Source(**source) for name, source in document["sources"].items()}
    hardware, software = (_table(document[part], sources) for part in ("hardware", "software"))
    return Support(document["checked"], document["meanings"], hardware, software, sources)


def present() -> set[str]:
    """What the rows know a machine by: the processor's flags, and the GPU's architecture (``sm_90``, ``gfx942``)."""
    found = machine.cpu_flags()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_properties(0).gcnArchName if torch.version.hip else f"sm_{major}{minor}"
        found = found | {name.partition(":")[0]}
    return found


def here(found: set[str] | None = None) -> list[Row]:
    """The rows of this machine, one a kind: of the CPU rows that fit, the last."""
    found = present() if found is None else found
    return list({row.kind: row for row in load().hardware.rows if row.is_here(found)}.values())


def measure(repeats: int = 7) -> list[Here]:
    """The rows of this machine, with the rates of every format that it can multiply; some seconds."""
    measured = []
    for row in here():
        device, size = ("cuda", 4096) if row.kind == "gpu" else ("cpu", 1024)
        rates = {rate.what: rate for rate in machine.measure(512, size, repeats, device, tuple(MEASURED.values()))}
        measured.append(Here(row.name, device, {key: rates[what] for key, what in MEASURED.items() if what in rates}))
    return measured


def _table(part: Mapping[str, Any], sources: Mapping[str, Source]) -> Table:
    rows = []
    for row in part["rows"]:
        if list(row["cells"]) != list(part["columns"]):
            raise OctavoError(f"{FILE.name}: {row['name']} has other columns than its table")
        cells = {key: Cell(**(cell | {"sources": tuple(cell["sources"])})) for key, cell in row["cells"].items()}
        for key, cell in cells.items():
            if cell.status not in get_args(Status) or not cell.sources or not sources.keys() >= set(cell.sources):
                raise OctavoError(f"{FILE.name}: {row['name']}, {key}: not a known word with known sources: {cell}")
        rows.append(Row(row["name"], row["kind"], tuple(row["here"]), cells))
    return Table(part["title"], part["columns"], tuple(rows))
