"""An experiment: a published claim that anybody can run, change, and compare with the paper.

It is a folder ``experiments/NAME/`` of three files:

- ``README.md``      the claim, where it was published, the tolerance, what to change;
- ``run.py``         ``run(quick, seed, track, …) -> Result`` on the public API; what can be changed is an argument;
- ``expected.json``  the targets, in groups that share a source, a unit and a tolerance.

A target is met if ours is within ``absolute`` or ``relative`` of it (both: either will do), or, one-sided, if ours is
``at least`` or ``at most`` the value. Nothing here draws or writes: that is for ``octavo.report``.
"""

import difflib
import importlib.util
import inspect
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from octavo.errors import OctavoError

T = TypeVar("T")
Cell = str | int | float
Track = Callable[[list[Any], str], Iterable[Any]]
Source = Literal["published", "computed"]
Side = Literal["at least", "at most"]
Verdict = Literal["pass", "MISS", "not in quick runs", "not checked"]
FILES = ("README.md", "run.py", "expected.json")


@dataclass(frozen=True)
class Table:
    """Rows under columns; numbers are shown with ``digits`` significant ones."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    digits: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise OctavoError(f"table {self.name!r}: a row of {len(row)} cells under {len(self.columns)} columns")


@dataclass(frozen=True)
class Series:
    """One line, set of bars or row of strokes; ``low`` and ``high`` shade a band about a line."""

    label: str
    x: tuple[Cell, ...]
    y: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False

    def __post_init__(self) -> None:
        for name in ("x", "y", "low", "high"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if any(values and len(values) != len(self.x) for values in (self.y, self.low, self.high)):
            raise OctavoError(f"series {self.label!r}: x, y, low and high must have the same length")


@dataclass(frozen=True)
class Plot:
    """A picture as data: ``octavo.report.plots`` draws it, and its numbers go into a CSV file as well.

    ``kind``: "line" (points joined), "steps", "bars" (one group for every x) or "strokes" (a number line a series).
    ``marks``: vertical lines with a word each.
    """

    name: str
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    kind: Literal["line", "steps", "bars", "strokes"] = "line"
    x_scale: Literal["linear", "log2", "log10"] = "linear"
    y_scale: Literal["linear", "log2", "log10"] = "linear"
    marks: tuple[tuple[float, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "series", tuple(self.series))


@dataclass(frozen=True)
class Result:
    """What a run found: named values to compare with the targets, tables, plots, and remarks."""

    values: Mapping[str, float]
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tables", "plots", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Target:
    """A number to reproduce. ``unchecked`` is the reason why this machine cannot; ``reason`` why ours is another."""

    name: str
    value: float
    source: Source
    where: str = ""
    unit: str = ""
    absolute: float | None = None
    relative: float | None = None
    side: Side | None = None
    quick: bool = True
    reason: str = ""
    unchecked: str = ""

    def met(self, ours: float) -> bool:
        """Whether ours is as near as the tolerance asks, or on the right side."""
        if not math.isfinite(ours):
            return False
        if self.side == "at least":
            return ours >= self.value
        if self.side == "at most":
            return ours <= self.value
        slack = max(self.absolute or 0.0, abs(self.value) * (self.relative or 0.0))
        return abs(ours - self.value) <= slack * (1 + 1e-9)

    @property
    def tolerance(self) -> str:
        """The tolerance in words."""
        if self.side:
            return self.side
        both = [f"±{self.absolute:g}"] if self.absolute is not None else []
        both += [f"±{100 * self.relative:g} %"] if self.relative is not None else []
        return " or ".join(both)


@dataclass(frozen=True)
class Check:
    """A target with ours beside it."""

    target: Target
    ours: float | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    name: str
    title: str
    claim: str
    readme: str
    seed: int
    quick: bool
    seconds: float
    result: Result
    checks: tuple[Check, ...]

    @property
    def missed(self) -> list[Check]:
        """The targets that were checked and not met."""
        return [check for check in self.checks if check.verdict == "MISS"]

    @property
    def met(self) -> int:
        """How many targets were checked and met."""
        return sum(check.verdict == "pass" for check in self.checks)


@dataclass(frozen=True)
class Experiment:
    """An experiment's folder, read and checked."""

    name: str
    folder: Path
    readme: str
    targets: tuple[Target, ...]
    function: Callable[..., Result] = field(repr=False)

    @property
    def title(self) -> str:
        """The README's heading."""
        return self.readme.splitlines()[0].lstrip("# ").strip()

    @property
    def claim(self) -> str:
        """The README's first paragraph."""
        paragraphs = re.split(r"\n\s*\n", self.readme.partition("\n")[2].strip())
        return " ".join(paragraphs[0].split())

    @property
    def parameters(self) -> dict[str, Any]:
        """What can be changed, with the defaults."""
        found = inspect.signature(self.function).parameters
        return {name: p.default for name, p in found.items() if name not in ("quick", "seed", "track")}

    def run(
        self, quick: bool = False, seed: int = 0, track: Track = lambda items, label: items, **parameters: Any
    ) -> Outcome:
        """Run it and compare with the targets; ``parameters`` go to ``run.py``'s function."""
        if unknown := set(parameters) - set(self.parameters):
            raise OctavoError(
                f"experiment {self.name} has no parameter {sorted(unknown)[0]!r}; it has {', '.join(self.parameters)}"
            )
        started = time.perf_counter()
        try:
            result = self.function(quick=quick, seed=seed, track=track, **parameters)
        except OctavoError:
            raise
        except Exception as error:  # whoever changed a line wants to know which
            file = str(self.folder / "run.py")
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            where = f", line {lines[-1]}" if lines else ""
            raise OctavoError(f"{file}{where}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - started
        if not isinstance(result, Result):
            raise OctavoError(f"{self.folder / 'run.py'}: run() must return a Result, not {type(result).__name__}")
        checks = tuple(compare(target, result.values, quick) for target in self.targets)
        return Outcome(self.name, self.title, self.claim, self.readme, seed, quick, seconds, result, checks)


def compare(target: Target, values: Mapping[str, float], quick: bool = False) -> Check:
    """Put ours beside the target."""
    ours = values.get(target.name)
    if target.unchecked:
        return Check(target, ours, "not checked", target.unchecked)
    if quick and not target.quick:
        return Check(target, ours, "not in quick runs")
    if ours is None:
        return Check(target, None, "MISS", "the run gave no value of this name")
    if target.met(float(ours)):
        return Check(target, float(ours), "pass", target.reason)
    return Check(target, float(ours), "MISS", target.reason or "no reason is known")


def find_folder(start: Path | None = None) -> Path:
    """The folder of experiments: ``experiments`` here or in a folder above, else beside the package."""
    start = (start or Path.cwd()).resolve()
    beside = Path(__file__).resolve().parents[2]
    for place in (start, *start.parents, beside):
        if names(place / "experiments"):
            return place / "experiments"
    raise OctavoError(
        f"there is no folder `experiments` in {start} or above; run this in a clone of Octavo's repository, "
        "or say where it is"
    )


def names(folder: Path) -> list[str]:
    """The experiments in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / "run.py").is_file())


def load(name: str, folder: Path | None = None) -> Experiment:
    """Read an experiment's three files. Raises ``OctavoError`` that names what is missing or broken."""
    folder = folder or find_folder()
    known = names(folder)
    if name not in known:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=2, cutoff=0.4)
        near = near or [other for other in known if name.lower() in other][:2]
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known) or 'none'}"
        raise OctavoError(f"no experiment in {folder} is called {name!r}; {hint}")
    place = folder / name
    missing = [file for file in FILES if not (place / file).is_file()]
    if missing:
        raise OctavoError(f"experiment {name} lacks {', '.join(missing)} in {place}")
    readme = (place / "README.md").read_text(encoding="utf-8").strip()
    if not readme.startswith("# "):
        raise OctavoError(f"{place / 'README.md'} must begin with a heading, '# …'")
    return Experiment(name, place, readme, read_targets(place / "expected.json"), _function(name, place / "run.py"))


def read_targets(file: Path) -> tuple[Target, ...]:
    """The targets of an ``expected.json``.

    ``{"groups": [{"source": "published", "where": "figure 5", "absolute": 0.1, "values": {name: value}}]}``; a group
    may also have ``unit``, ``relative``, ``side``, ``quick``, ``unchecked``, and ``reasons`` for single names.
    """

    def wrong(why: str) -> OctavoError:
        return OctavoError(f"{file}: {why}")

    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise wrong(f"it cannot be read as JSON ({error})") from None
    groups = document.get("groups") if isinstance(document, dict) else None
    if not isinstance(groups, list) or not groups:
        raise wrong('it must be an object with a list "groups"')
    targets: dict[str, Target] = {}
    allowed = set(Target.__dataclass_fields__) - {"name", "value", "reason"}
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("values"), dict):
            raise wrong('every group must be an object with "values": {name: number}')
        common = {key: value for key, value in group.items() if key not in ("values", "reasons")}
        if unknown := set(common) - allowed:
            raise wrong(f"a group has an unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(allowed))}")
        if common.get("source") not in get_args(Source):
            raise wrong(f"the source of a group must be one of {', '.join(get_args(Source))}")
        for key in ("absolute", "relative"):
            if key in common and not (_number(common[key]) and common[key] >= 0):
                raise wrong(f"{key!r} must be a number that is not negative, not {common[key]!r}")
        if common.get("side", "at least") not in get_args(Side):
            raise wrong(f"side must be 'at least' or 'at most', not {common['side']!r}")
        ways = [key for key in ("absolute", "relative", "side", "unchecked") if key in common]
        if not ways:
            raise wrong("a group needs a tolerance: absolute, relative, side, or the reason why it is unchecked")
        reasons = group.get("reasons", {})
        for name, value in group["values"].items():
            if not _number(value):
                raise wrong(f"the value of {name!r} must be a finite number, not {value!r}")
            if name in targets:
                raise wrong(f"the target {name!r} is there twice")
            targets[name] = Target(name=name, value=float(value), reason=reasons.get(name, ""), **common)
        if lost := set(reasons) - set(group["values"]):
            raise wrong(f"there is a reason for {sorted(lost)[0]!r}, but no such target in its group")
    return tuple(targets.values())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _function(name: str, file: Path) -> Callable[..., Result]:
    module_name = f"octavo_experiment_{name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(module_name, None)
        raise OctavoError(f"{file} does not run: {type(error).__name__}: {error}") from error
    function = getattr(module, "run", None)
    if not callable(function):
        raise OctavoError(f"{file} has no function run(quick, seed, track)")
    parameters = inspect.signature(function).parameters
    if lacking := [word for word in ("quick", "seed", "track") if word not in parameters]:
        raise OctavoError(f"{file}: run() lacks the argument {lacking[0]!r}")
    found: Callable[..., Result] = function
    return found
