"""Files that appear whole or not at all, and numbers as text."""

import csv
import io
import math
import os
import uuid
from pathlib import Path

from octavo.analysis.experiment import Cell, Check, Plot, Table
from octavo.errors import OctavoError


def check_folder(folder: Path) -> None:
    """Refuse at once what ``write`` could not do after minutes of work; the folder exists afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".octavo-{uuid.uuid4().hex[:12]}"
        trial.touch()
        trial.unlink()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise OctavoError(f"{folder} cannot be written ({why}). Choose another folder with --out.") from None


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files, then give them their names; an interruption leaves old files as they were."""
    aside: dict[Path, Path] = {}
    mark = f".octavo-{uuid.uuid4().hex[:12]}"
    try:
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            aside[target] = target.with_name(mark + target.name)
            with open(aside[target], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for target, temporary in aside.items():
            os.replace(temporary, target)
    except OSError as error:
        raise OctavoError(
            f"{folder} cannot be written ({error.strerror}). Choose another folder with --out."
        ) from error
    finally:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)


def number(value: Cell | None, digits: int = 4) -> str:
    """A cell as people read it: ``digits`` significant ones, no trailing noise, powers of ten where it is long."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not math.isfinite(value):
        return {True: "∞", False: "−∞"}[value > 0] if math.isinf(value) else "NaN"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}" if abs(value) >= 10_000 else f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text and float(value).is_integer() else text


def table_csv(table: Table) -> bytes:
    """A table, every digit of it."""
    return _csv([table.columns, *table.rows])


def plot_csv(plot: Plot) -> bytes:
    """A plot's numbers: one line a point."""
    rows: list[tuple[Cell, ...]] = [("series", plot.x, plot.y or "value", "low", "high")]
    for series in plot.series:
        for index, x in enumerate(series.x):
            values = (series.y, series.low, series.high)
            rows.append((series.label, x, *(v[index] if v else "" for v in values)))
    return _csv(rows)


def checks_csv(checks: tuple[Check, ...]) -> bytes:
    """The targets with ours beside them."""
    rows: list[tuple[Cell, ...]] = [("target", "value", "tolerance", "ours", "unit", "verdict", "source", "reason")]
    for check in checks:
        t, ours = check.target, "" if check.ours is None else check.ours
        source = ", ".join(word for word in (t.source, t.where) if word)
        rows.append((t.name, t.value, t.tolerance, ours, t.unit, check.verdict, source, check.reason))
    return _csv(rows)


def _csv(rows: list[tuple[Cell, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
