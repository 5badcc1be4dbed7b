"""A ``Plot`` as a PNG, for light and for dark pages."""

import io
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.analysis.experiment import Plot
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Theme(NamedTuple):
    """The colours of a page."""

    paper: str
    ink: str
    faint: str
    colours: tuple[str, ...]


# Okabe and Ito's palette, which colour-blind readers can tell apart, lifted for the dark page
LIGHT = Theme(
    "#ffffff",
    "#1f2933",
    "#d9dee3",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b", "#7a5fc0"),
)
DARK = Theme(
    "#161b22",
    "#dfe5ec",
    "#343c46",
    ("#4aa8e0", "#ff8b45", "#2ec99b", "#e59bc4", "#f2b93b", "#8fd0f5", "#a9b1ba", "#a994ea"),
)
MARKERS = "osD^vPX*"
BELOW = "outside lower center"
LINE = 96  # letters of a legend beside one another


def png(plot: Plot, theme: Theme = LIGHT) -> bytes:
    """Draw it. Needs matplotlib."""
    try:
        import matplotlib
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError:
        raise OctavoError("the plots need matplotlib: pip install 'octavo[cli]'") from None
    style: dict[str, Any] = {
        "font.size": 10,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "grid.color": theme.faint,
        "axes.prop_cycle": cycler(color=theme.colours),
    }
    with matplotlib.rc_context(style):
        height = 1.3 + 0.42 * len(plot.series) if plot.kind == "strokes" else 4.0
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.subplots()
        {"line": _lines, "steps": _lines, "bars": _bars, "strokes": _strokes}[plot.kind](axes, plot, theme)
        axes.set_title(plot.title, fontsize=11, loc="left", pad=10)
        axes.set_xlabel(plot.x)
        if plot.y:
            axes.set_ylabel(plot.y)
        _legend(figure, axes, plot)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        for place, word in plot.marks:
            axes.axvline(place, color=theme.ink, linewidth=0.8, linestyle=":")
            low = axes.get_xaxis_transform()
            axes.text(place, 0.02, word, transform=low, fontsize=8, va="bottom", ha="right", rotation=90)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def _scale(axes: "Axes", plot: Plot) -> None:
    for axis, scale in (("x", plot.x_scale), ("y", plot.y_scale)):
        if scale != "linear":
            base = 2 if scale == "log2" else 10
            (axes.set_xscale if axis == "x" else axes.set_yscale)("log", base=base)


def _lines(axes: "Axes", plot: Plot, theme: Theme) -> None:
    _scale(axes, plot)
    for index, series in enumerate(plot.series):
        colour = theme.colours[index % len(theme.colours)]
        marker = MARKERS[index % len(MARKERS)] if len(series.x) <= 24 and plot.kind == "line" else None
        axes.plot(
            series.x,
            series.y,
            label=series.label,
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=1.6,
            linestyle="--" if series.dashed else "-",
            drawstyle="steps-mid" if plot.kind == "steps" else "default",
        )
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.18, linewidth=0)
    axes.grid(True, linewidth=0.6)


def _bars(axes: "Axes", plot: Plot, theme: Theme) -> None:
    _scale(axes, plot)
    groups = list(dict.fromkeys(x for series in plot.series for x in series.x))
    width = 0.84 / len(plot.series)
    for index, series in enumerate(plot.series):
        places = [groups.index(x) + (index - (len(plot.series) - 1) / 2) * width for x in series.x]
        colour = theme.colours[index % len(theme.colours)]
        axes.bar(places, series.y, width * 0.94, label=series.label, color=colour)
    words = TextWrapper(max(8, 76 // len(groups)), break_long_words=False, break_on_hyphens=False)
    size = 10 if len(groups) < 6 else 8.5
    axes.set_xticks(range(len(groups)), [words.fill(str(group)) for group in groups], fontsize=size)
    axes.tick_params(axis="x", length=0)
    axes.grid(True, axis="y", linewidth=0.6)


def _strokes(axes: "Axes", plot: Plot, theme: Theme) -> None:
    _scale(axes, plot)
    for index, series in enumerate(plot.series):
        values = [x for x in series.x if isinstance(x, int | float) and (plot.x_scale == "linear" or x > 0)]
        colour = theme.colours[index % len(theme.colours)]
        axes.vlines(values, -index - 0.35, -index + 0.35, color=colour, linewidth=0.7)
    axes.set_yticks([-i for i in range(len(plot.series))], [series.label for series in plot.series])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _legend(figure: "Figure", axes: "Axes", plot: Plot) -> None:
    if plot.kind == "strokes" or (len(plot.series) == 1 and not plot.series[0].label):
        return
    widest = max((len(series.label) for series in plot.series), default=0)
    columns = max(1, min(len(plot.series), LINE // (widest + 8)))
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8.5, frameon=False, ncols=columns, loc=BELOW)
