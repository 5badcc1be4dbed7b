"""A layer's numbers against the numbers that a format has.

All are divided by the largest of their row (see ``analysis.magnitudes``) and drawn over octaves. Below the layers stand
the formats' own numbers: where two are far apart rounding is coarse, and left of the first everything becomes zero.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from octavo.analysis.comparison import Comparison
from octavo.analysis.magnitudes import OCTAVES, PER_OCTAVE, LayerMagnitudes, Magnitudes
from octavo.core import formats
from octavo.core.formats import Format, IntegerFormat
from octavo.report import svg
from octavo.report.blocks import blocks, split, titles
from octavo.report.html import code, fold
from octavo.report.numbers import count, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 14
MOST_LAYERS = 224
MOST_LINES = 4
WEIGHTS, INPUTS = "series-0", "series-1"


def section(comparison: Comparison, magnitudes: Sequence[LayerMagnitudes]) -> str:
    """A fold a block; of very many layers those that cost most. Empty if there are none."""
    if not magnitudes:
        return ""
    lines = _formats(comparison)
    judge = lines[0]
    found = {m.layer: m for m in _costliest(comparison, magnitudes)}
    weights, inputs = (f'<span class="key" style="background:var(--{c})"></span>' for c in (WEIGHTS, INPUTS))
    parts = [
        f"<p>How large the {weights}weights and {inputs}inputs of each layer are, from 1/65536 of the largest number "
        "of their row (a channel of the weight, a token of the input) to the largest itself. Below stand the numbers "
        "that each format has: a layer does well where its curves stand over dense strokes.</p>"
    ]
    if len(found) < len(magnitudes):
        parts.append(f"<p>These are the {len(found)} layers that cost most, of {len(magnitudes):,}.</p>")
    number, by_block = 0, blocks(found)
    labels = titles(by_block)
    for index, (block, names) in enumerate(by_block.items()):
        figures = []
        for start in range(0, len(names), MOST_ROWS):
            rows = [(split(layer)[1], found[layer]) for layer in names[start : start + MOST_ROWS]]
            drawn = draw(rows, lines, f"lines-{number}", f"The numbers of {labels[block]}", judge)
            figures.append(f"<figure>{drawn}<figcaption>{_most_lost(rows, judge)}</figcaption></figure>")
            number += 1
        body = f'<div class="cards">{"".join(figures)}</div>'
        parts.append(fold(f"{labels[block]}: {count(len(names), 'layer')}", body, index == 0))
    return "\n".join(parts)


def draw(
    rows: Sequence[tuple[str, LayerMagnitudes]], formats: Sequence[Format], name: str, title: str, judge: Format
) -> str:
    """The layers' weights and inputs, a row each, over the formats' numbers. ``judge``: whose zeros are counted."""
    library = svg.matplotlib()
    height = 0.55 + 0.4 * len(rows) + 0.21 * len(formats)
    with library.rc_context(svg.style(9)):
        figure = library.figure.Figure(figsize=(4.3, height), layout="constrained")
        axes = figure.subplots()
        for index, (_, found) in enumerate(rows):
            base = -float(index)
            axes.plot([-OCTAVES, 0], [base, base], color=svg.COLOUR["line"], linewidth=0.6)
            _ridge(axes, found.weights, base, WEIGHTS)
            if found.inputs is not None:
                _ridge(axes, found.inputs, base, INPUTS)
        bottom = -float(len(rows)) + 0.35
        for index, fmt in enumerate(formats):
            _line(axes, fmt, bottom - 0.5 * index)
        places = [-float(i) + 0.15 for i in range(len(rows))] + [bottom - 0.5 * i - 0.15 for i in range(len(formats))]
        axes.set_yticks(places, [_cut(label) for label, _ in rows] + [fmt.name for fmt in formats])
        for label in axes.get_yticklabels()[: len(rows)]:
            label.set_color(svg.COLOUR["ink"])
        axes.set_ylim(bottom - 0.5 * len(formats), 1.0)
        axes.set_xlim(-OCTAVES - 0.2, 0.2)
        axes.set_xticks([-16, -12, -8, -4, 0], ["1/65536", "1/4096", "1/256", "1/16", "largest"])
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(True, axis="x")
        said = "; ".join(f"{label}: {_words(found, judge)}" for label, found in rows)
        return svg.inline(figure, name, title, said, "lone")


def zeroed(found: Magnitudes, fmt: Format) -> float:
    """The share of the numbers other than zero that the format rounds to zero: less than half its smallest number."""
    values = fmt.values()
    edge = float((values[values > 0][0] / 2 / fmt.max).log2()) if fmt.max else 0.0
    place = (edge + OCTAVES) * PER_OCTAVE  # in bins; what is below all bins is taken to lie below the edge
    if place < 0:
        return 0.0
    whole = min(int(place), len(found.counts))
    part = found.counts[whole] * (place - whole) if whole < len(found.counts) else 0.0
    return (found.below + sum(found.counts[:whole]) + part) / max(1, found.total - found.zeros)


def _most_lost(rows: Sequence[tuple[str, LayerMagnitudes]], judge: Format) -> str:
    lost = [(zeroed(m.inputs, judge), layer) for layer, m in rows if m.inputs is not None]
    if not lost:
        return "No data came to these layers: only their weights are shown."
    (share, layer), fmt = max(lost), escape(judge.name)
    if share < 0.0005:
        return f"Hardly any of these inputs become zero in {fmt}."
    return f"In {fmt}, {short(100 * share)} % of the inputs of {code(layer)} become zero, the most of these."


def _formats(comparison: Comparison) -> list[Format]:
    """The 8-bit formats of the candidates, integers first."""
    schemes = [c.scheme for c in comparison.candidates if c.scheme is not None]
    sides = [how.format for scheme in schemes for how in (scheme.weight, scheme.input) if how is not None]
    found = dict.fromkeys(fmt for fmt in sides if fmt.bits <= 8)
    ordered = sorted(found, key=lambda fmt: not isinstance(fmt, IntegerFormat))
    return ordered[:MOST_LINES] or [formats.INT8, formats.E4M3FN]


def _costliest(comparison: Comparison, magnitudes: Sequence[LayerMagnitudes]) -> list[LayerMagnitudes]:
    """All of them, or those with the largest finite cost under any scheme, in their order."""
    if len(magnitudes) <= MOST_LAYERS:
        return list(magnitudes)
    worst: dict[str, float] = {}
    for cell in comparison.cells:
        if math.isfinite(cell.cost):
            worst[cell.layer] = max(worst.get(cell.layer, 0.0), cell.cost)
    kept = {m.layer for m in sorted(magnitudes, key=lambda m: -worst.get(m.layer, 0.0))[:MOST_LAYERS]}
    return [m for m in magnitudes if m.layer in kept]


def _words(found: LayerMagnitudes, judge: Format) -> str:
    inputs = "no inputs seen" if found.inputs is None else f"{short(100 * zeroed(found.inputs, judge))} % of the inputs"
    return f"{short(100 * zeroed(found.weights, judge))} % of the weights and {inputs} become zero in {judge.name}"


def _ridge(axes: "Axes", found: Magnitudes, base: float, colour: str) -> None:
    most = max(found.counts) or 1
    x = [(i + 0.5) / PER_OCTAVE - OCTAVES for i in range(len(found.counts))]
    y = [base + 0.82 * count / most for count in found.counts]
    axes.fill_between(x, y, base, color=svg.COLOUR[colour], alpha=0.28, linewidth=0)
    axes.plot(x, y, color=svg.COLOUR[colour], linewidth=1.1)


def _line(axes: "Axes", fmt: Format, top: float) -> None:
    """The format's positive numbers as strokes: one path."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    values = fmt.values()
    places = (values[values > 0] / fmt.max).log2()
    points = [(x, y) for x in places[places >= -OCTAVES].tolist() for y in (top, top - 0.3)]
    codes = [Path.MOVETO, Path.LINETO] * (len(points) // 2)
    axes.add_patch(PathPatch(Path(points, codes), edgecolor=svg.COLOUR["ink"], facecolor="none", linewidth=0.5))


def _cut(label: str) -> str:
    return label if len(label) <= 20 else f"…{label[-19:]}"
