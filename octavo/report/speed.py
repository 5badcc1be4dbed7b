"""What a race found, as tables and plots: how fast, beside the baseline, and how near to what the machine can do."""

from collections.abc import Sequence

from octavo.analysis.bench.race import Race
from octavo.analysis.bench.roofline import Roofline
from octavo.analysis.experiment import Cell, Plot, Series, Table

POINTS = 33  # of a roof's line: more than get a marker


def tables(race: Race, roofline: Roofline | None) -> tuple[Table, ...]:
    """A table a task; a contender that could not run has its reason there."""
    return tuple(_table(race, task, roofline) for task in race.tasks)


def _table(race: Race, task: str, roofline: Roofline | None) -> Table:
    timings = race.of(task)
    unit = timings[0].work.unit
    columns = ["", unit, "± %", f"to {race.baseline}"]
    shares = {t.contender: roofline.share(t) for t in timings} if roofline is not None else {}
    roofs = any(share is not None for share in shares.values())
    columns += ["% of roof"] if roofs else []
    columns += ["note"] if any(t.reason for t in timings) else []
    rows: list[list[Cell]] = []
    for timing in timings:
        row: list[Cell] = [timing.contender, _cell(timing.rate), _percent(timing.spread), _cell(race.ratio(timing))]
        row += [_percent(shares[timing.contender])] if roofs else []
        row += [timing.reason] if "note" in columns else []
        rows.append(row)
    return Table(task, task, tuple(columns), tuple(map(tuple, rows)), digits=3)


def plots(race: Race, roofline: Roofline | None) -> tuple[Plot, ...]:
    """The ratios to the baseline; and the roofline with a line a kernel, where it is known what they do."""
    groups = _alike(race)
    ratios = [_ratios(race, tasks) for tasks in groups]
    roofs = [] if roofline is None else [_roofs(race, tasks, roofline) for tasks in groups]
    return tuple(plot for plot in (*ratios, *roofs) if plot is not None)


def _ratios(race: Race, tasks: Sequence[str]) -> Plot | None:
    """Bars: a group a contender, a bar a task."""
    series = []
    for task in tasks:
        found = [(t.contender, ratio) for t in race.of(task) if (ratio := race.ratio(t)) is not None]
        if found:
            names, values = zip(*found, strict=True)
            series.append(Series(task, names, values))
    title = f"Speed relative to {race.baseline}"
    return Plot(f"speed-{tasks[0]}", title, "", f"times {race.baseline}", tuple(series), "bars") if series else None


def _alike(race: Race) -> list[list[str]]:
    """Tasks that go into one picture: products with the same weight, or all of a model's."""
    groups: dict[str, list[str]] = {}
    for task in race.tasks:
        groups.setdefault(task.partition("x")[2], []).append(task)
    return list(groups.values())


def _roofs(race: Race, tasks: Sequence[str], roofline: Roofline) -> Plot | None:
    """Operations a second over operations a byte, both logarithmic: the roofs dashed, a line a contender."""
    found: dict[str, list[tuple[float, float]]] = {}
    for t in (t for task in tasks for t in race.of(task)):
        if t.flops and t.nbytes and t.median:
            found.setdefault(t.contender, []).append((t.flops / t.nbytes, t.flops / t.median / 1e9))
    if not found:
        return None
    intensities = [x for points in found.values() for x, _ in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    steps = tuple(low * (high / low) ** (i / (POINTS - 1)) for i in range(POINTS))
    series = [
        Series(f"roof, {unit}", steps, tuple(_roof(roofline, unit, x) for x in steps), dashed=True)
        for unit in roofline.peaks
    ]
    for name, points in found.items():
        places, rates = zip(*sorted(points), strict=True)
        series.append(Series(name, places, rates))
    size = tasks[0].partition("x")[2].replace("x", " × ")
    title = f"Roofline: [M × {size}], dashed is what the machine can do"
    return Plot(f"roofline-{tasks[0]}", title, "operations a byte", "GFLOP/s", tuple(series), "line", "log2", "log10")


def _roof(roofline: Roofline, unit: str, intensity: float) -> float:
    return min(roofline.peaks[unit], intensity * roofline.bandwidth) / 1e9


def _cell(value: float | None) -> Cell:
    return "" if value is None else value


def _percent(value: float | None) -> Cell:
    """Whole percents."""
    return "" if value is None else round(100 * value)
