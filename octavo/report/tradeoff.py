"""The trade-off: what each scheme costs against how large and how slow the model is then, a point a scheme.

Schemes share a height in both panels, so each is named once, beside the last one. Costs differ by orders of magnitude
and may be negative by chance: the axis is linear up to what matters (the budget) and logarithmic above.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from octavo.report import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

MOST_NAMED = 24
Kind = Literal["int8", "fp8", "mixed", "float", "chosen"]
#: How the kinds of schemes are told apart, by shape as well as by colour, and what they are called.
MARKS = {
    "int8": ("o", "series-0", "INT8"),
    "fp8": ("D", "series-2", "FP8"),
    "mixed": ("P", "series-3", "both"),
    "float": ("s", "ink", "as it is"),
    "chosen": ("*", "accent", "chosen"),
}


@dataclass(frozen=True)
class Point:
    """A scheme: its cost, bytes, and time as a multiple of the float model's; ``kind`` decides how it is marked."""

    name: str
    cost: float
    megabytes: float
    time: float | None
    kind: Kind = "mixed"


def draw(points: Sequence[Point], cost: str, unit: str, budget: float | None, narrow: bool) -> str:
    """The plot as SVG, for a wide page or a narrow one; ``cost`` names the axis. All figures are finite."""
    timed = [p for p in points if p.time is not None]
    panels = 2 if timed else 1
    library = svg.matplotlib()
    rows = min(len(points), MOST_NAMED)
    height = max(3.0, 0.6 + 0.27 * rows)
    size = (3.5, panels * (height + 0.2)) if narrow else (7.6, height)
    with library.rc_context(svg.style(9.5)):
        figure = library.figure.Figure(figsize=size, layout="constrained")
        if narrow:
            axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
        else:
            axes = list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
        for index, panel in enumerate(axes):
            _panel(panel, points, index == 1, unit, budget)
            if narrow or index == 0:
                panel.set_ylabel(cost)
        present = [kind for kind in MARKS if any(p.kind == kind for p in points)]
        figure.legend(
            handles=[_handle(kind) for kind in present], loc="outside lower left", ncols=len(present), frameon=False,
            handletextpad=0.1, columnspacing=1.2, fontsize=9,
        )  # fmt: skip
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.06)
        figure.canvas.draw()
        for panel in axes if narrow else axes[-1:]:
            _names(panel, points if panel is axes[0] else timed, narrow)
        title = f"{cost} against size" + (" and time" if timed else "")
        kind = "narrow" if narrow else "broad"
        return svg.inline(figure, f"trade-{kind}", title, _told(points, unit), kind)


def _panel(panel: "Axes", points: Sequence[Point], time: bool, unit: str, budget: float | None) -> None:
    costs = [p.cost for p in points]
    threshold = budget if budget is not None and budget > 0 else _threshold(costs)
    panel.set_yscale("symlog", linthresh=threshold, linscale=0.7)
    low, high = min([0.0, *costs]), max([threshold * 1.5, *costs])
    panel.set_ylim(low - 0.5 * threshold, high * 1.7)
    panel.grid(True)
    ticks = [t for t in _ticks(threshold, high) if low <= t <= high * 1.5]
    panel.set_yticks(ticks, [f"{t:g}{unit}" for t in ticks], minor=False)
    panel.set_yticks([], minor=True)
    panel.tick_params(length=0)
    if budget is not None and budget > 0:
        panel.axhspan(low - 0.5 * threshold, budget, color=svg.COLOUR["accent"], alpha=0.1, linewidth=0)
        panel.axhline(budget, color=svg.COLOUR["accent"], linewidth=1, linestyle=(0, (4, 3)))
        if not time:
            words: dict[str, Any] = {"color": svg.COLOUR["accent"], "fontsize": 8.5, "va": "bottom"}
            panel.annotate("within the budget", (0, 0), (5, 5), "axes fraction", "offset points", **words)
    for point in points:
        x = point.time if time else point.megabytes
        if x is not None:
            _mark(panel, x, point)
    known = [x for p in points if (x := p.time if time else p.megabytes) is not None]
    spread = (max(known) - min(known)) or max(known) or 1.0
    left = 0.0 if min(known) < spread else min(known) - 0.15 * spread
    panel.set_xlim(left, max(known) + 0.12 * spread)
    panel.set_xlabel("time here, × float" if time else "size, MB")
    panel.locator_params(axis="x", nbins=5)


def _handle(kind: str) -> "Line2D":
    from matplotlib.lines import Line2D

    shape, colour, label = MARKS[kind]
    face = "none" if kind == "float" else svg.COLOUR[colour]
    size = 10 if shape == "*" else 6
    return Line2D(
        [], [], color="none", marker=shape, markerfacecolor=face, markeredgecolor=svg.COLOUR[colour], markersize=size,
        label=label,
    )  # fmt: skip


def _mark(panel: "Axes", x: float, point: Point) -> None:
    shape, colour, _ = MARKS[point.kind]
    size = {"*": 15.0, "D": 5.0, "P": 7.0}.get(shape, 6.0)
    face = "none" if point.kind == "float" else svg.COLOUR[colour]
    look: dict[str, Any] = {"color": svg.COLOUR[colour], "markerfacecolor": face, "markersize": size, "zorder": 4}
    panel.plot(x, point.cost, shape, markeredgewidth=1.2 if point.kind == "float" else 0.0, **look)


def _names(panel: "Axes", points: Sequence[Point], narrow: bool) -> None:
    """Names at the right edge, as near to their point's height as there is room, with a thin line to it."""
    ordered = sorted(points, key=lambda p: p.cost)
    if len(ordered) > MOST_NAMED:
        ordered.sort(key=lambda p: p.kind not in ("float", "chosen"))
        ordered = sorted(ordered[:MOST_NAMED], key=lambda p: p.cost)
    box = panel.get_window_extent()
    gap = 12.5 * panel.figure.dpi / 72 / box.height
    to_axes = panel.transData + panel.transAxes.inverted()
    time = panel.get_xlabel().startswith("time")
    at = [tuple(to_axes.transform((p.time if time and p.time is not None else p.megabytes, p.cost))) for p in ordered]
    heights = _spread([y for _, y in at], gap)
    for point, (x, y), height in zip(ordered, at, heights, strict=True):
        strong = point.kind == "chosen"
        panel.annotate(
            point.name if len(point.name) <= (22 if narrow else 34) else f"{point.name[: 21 if narrow else 33]}…",
            (x, y), (1.03, height), "axes fraction", "axes fraction",
            va="center", ha="left", fontsize=9, weight="bold" if strong else "normal",
            color=svg.COLOUR["accent" if strong else "ink"], annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": svg.COLOUR["line"], "linewidth": 0.7, "shrinkB": 4, "shrinkA": 1,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least ``gap``, as little as may be, within 0 … 1 if there is room."""
    places: list[float] = []
    groups: list[list[float]] = []  # neighbours that touch share their displacement
    for height in heights:
        groups.append([height])
        while len(groups) > 1:
            upper, lower = groups[-1], groups[-2]
            middle = [sum(g) / len(g) for g in (lower, upper)]
            if middle[1] - middle[0] >= gap * (len(lower) + len(upper)) / 2:
                break
            groups[-2:] = [lower + upper]
    for group in groups:
        reach = gap * (len(group) - 1) / 2
        centre = min(max(sum(group) / len(group), reach), max(1 - reach, reach))
        places += [centre - reach + i * gap for i in range(len(group))]
    for i in range(1, len(places)):  # clamping may have brought groups together again
        places[i] = max(places[i], places[i - 1] + gap)
    return places


def _threshold(costs: Sequence[float]) -> float:
    """Where the axis turns logarithmic if there is no budget: at the tenth part of the largest cost."""
    largest = max((abs(c) for c in costs), default=0.0)
    return max(largest / 10, 1e-5)


def _ticks(threshold: float, high: float) -> list[float]:
    """Zero, and 1, 3, 10 … times a power of ten up to ``high``."""
    power = math.floor(math.log10(threshold))
    ticks = [0.0]
    while 10.0**power <= high * 2:
        ticks += [m * 10.0**power for m in (1, 3) if m * 10.0**power >= threshold * 0.3]
        power += 1
    return ticks


def _told(points: Sequence[Point], unit: str) -> str:
    """The plot in words."""
    said = []
    for p in sorted(points, key=lambda p: p.cost):
        time = "" if p.time is None else f", {p.time:.2f} times the float model's time"
        said.append(f"{p.name}: {p.cost:.2g}{unit}, {p.megabytes:.1f} MB{time}")
    return "; ".join(said)
