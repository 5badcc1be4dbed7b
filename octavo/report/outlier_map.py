"""Where the outliers are: hidden dimension × layer as a map, the dimensions that have them, massive activations."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.analysis.outliers import Input, Outliers
from octavo.report import svg
from octavo.report.blocks import split
from octavo.report.html import fold, grid, name
from octavo.report.numbers import count, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 2500
MOST_ROWS = 20
MOST_TICKS = 16


def section(found: Outliers | None) -> str:
    """The map, and tables; empty if nobody looked."""
    if found is None:
        return ""
    hidden = [x for x in found.inputs if x.width == found.width]
    places = sum(len(x.peaks) for x in hidden)
    parts = [_said(found)]
    if places:
        plots = (draw(hidden, found, narrow) for narrow in (False, True))
        parts.append(f"<figure>{''.join(plots)}<figcaption>{_caption(found, places)}</figcaption></figure>")
    if found.dimensions:
        rows = [
            [
                f"{'★ ' if d.systematic else ''}{d.index}",
                f"{d.layers} of {found.blocks}",
                f"{short(100 * d.tokens)} %",
                short(d.largest),
            ]
            for d in found.dimensions[:MOST_ROWS]
        ]
        heads = ["dimension", "blocks", "of the tokens", "largest"]
        told = "★ meets the criterion of LLM.int8(): in a quarter of the layers and 6 % of the tokens."
        table = f'<p class="soft small">{told}</p>' + grid("outlier dimensions", heads, rows)
        parts.append(fold(f"Dimensions with outliers: {_most(len(found.dimensions))}", table))
    if found.massive:
        rows = [
            [
                name(m.name),
                "–" if m.position is None else str(m.position),
                str(m.dimension),
                short(m.value),
                short(m.ratio),
            ]
            for m in found.massive[:MOST_ROWS]
        ]
        heads = ["enters", "token", "dimension", "value", "medians"]
        parts.append(
            fold(f"Massive activations: {_most(len(found.massive))}", grid("massive activations", heads, rows))
        )
    tails = sorted(found.of_layers, key=lambda x: -x.token_crest if math.isfinite(x.token_crest) else 0.0)[:MOST_ROWS]
    rows = [
        [name(x.names[0]), short(x.token_crest), short(x.crest), short(x.kurtosis), short(x.largest)] for x in tails
    ]
    heads = ["enters", "crest factor of a token", "of all", "kurtosis", "largest"]
    told = (
        "Crest factor: the largest number over the root mean square; INT8 is the more exact format up to about 12, "
        "E4M3 beyond. Kurtosis: 3 for a bell curve, more for heavier tails."
    )
    table = f'<p class="soft small">{told}</p>' + grid("heavy tails", heads, rows)
    parts.append(fold(f"Heaviest tails: {_most(len(found.of_layers))}", table))
    return "\n".join(parts)


def draw(hidden: Sequence[Input], found: Outliers, narrow: bool) -> str:
    """A dot an input and dimension, larger for larger numbers; ``hidden``: what has the hidden state's width."""
    points = [(peak, index, row) for row, x in enumerate(hidden) for index, peak in x.peaks]
    points = sorted(points, reverse=True)[:MOST_POINTS]
    systematic = {d.index for d in found.systematic}
    library = svg.matplotlib()
    size = (3.5, min(6.0, 1.2 + 0.05 * len(hidden))) if narrow else (7.6, min(6.0, 1.2 + 0.045 * len(hidden)))
    with library.rc_context(svg.style(9.5)):
        figure = library.figure.Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for strong in (False, True):
            some = [p for p in points if (p[1] in systematic) == strong]
            areas = [4 + 9 * max(0.0, math.log2(peak / found.threshold)) for peak, _, _ in some]
            axes.scatter(
                [index for _, index, _ in some],
                [row for _, _, row in some],
                s=areas,
                c=svg.COLOUR["accent" if strong else "series-0"],
                alpha=0.75,
                linewidths=0,
            )
        _layers(axes, hidden)
        axes.set_xlim(-0.01 * found.width, 1.01 * found.width)
        axes.set_xlabel("hidden dimension")
        axes.grid(True, axis="y")
        axes.tick_params(length=0)
        axes.locator_params(axis="x", nbins=4 if narrow else 8, integer=True)
        kind = "narrow" if narrow else "broad"
        return svg.inline(figure, f"outliers-{kind}", "Outliers by dimension and layer", _told(found), kind)


def _layers(axes: "Axes", hidden: Sequence[Input]) -> None:
    """Rows from the first layer, at the top, down; a tick where a block begins, as many as there is room for."""
    starts: dict[str, int] = {}
    for row, x in enumerate(hidden):
        starts.setdefault(split(x.names[0])[0] or x.names[0], row)
    step = -(-len(starts) // MOST_TICKS)
    ticks = list(starts.items())[::step]
    axes.set_yticks([row for _, row in ticks], [_last(block) for block, _ in ticks])
    axes.set_ylim(len(hidden) - 0.3, -0.7)


def _last(block: str) -> str:
    label = ".".join(block.split(".")[-2:])
    return label if len(label) <= 14 else f"…{label[-13:]}"


def _said(found: Outliers) -> str:
    dimensions = count(len(found.dimensions), "dimension")
    systematic = len(found.systematic)
    often = f"; {systematic} of them in many layers and tokens" if systematic else ""
    worst = max(found.inputs, key=lambda x: x.largest, default=None)
    largest = (
        "" if worst is None else f" The largest number of all, {short(worst.largest)}, enters {name(worst.names[0])}."
    )
    return (
        f"<p>Of the {found.width:,} dimensions of the hidden state, {dimensions} somewhere exceed "
        f"{found.threshold:g}{often}.{largest}</p>"
    )


def _caption(found: Outliers, places: int) -> str:
    shown = f" The {MOST_POINTS:,} largest of {places:,} are shown." if places > MOST_POINTS else ""
    strong = " Orange: the dimensions that have them in many layers." if found.systematic else ""
    return (
        f"Every dot is a dimension with an outlier on its way into a layer; larger dots, larger numbers.{strong}{shown}"
    )


def _most(number: int) -> str:
    return str(number) if number <= MOST_ROWS else f"{MOST_ROWS} of {number:,}"


def _told(found: Outliers) -> str:
    some = found.dimensions[:8]
    listed = "; ".join(
        f"dimension {d.index} in {d.layers} of {found.blocks} blocks, up to {d.largest:.0f}" for d in some
    )
    return listed or "no dimension has outliers"
