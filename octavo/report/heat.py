"""The heat map of a comparison, layer × scheme, as tables: read by eye, by screen reader, and with a finger.

Few layers are one table. Many are a table of their blocks, where costs are added up as the search does, and a folded
table a block.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from octavo.analysis.comparison import AS_IT_IS, Cell, Comparison
from octavo.report.blocks import blocks, split, titles
from octavo.report.html import fold, name, scrolling
from octavo.report.numbers import Units, count, decibels

FEW = 48
LEVELS = 6
Cells = Mapping[tuple[str, str], Cell]


@dataclass(frozen=True)
class Ramp:
    """Colours over costs: the strongest for those up to ``top``, each paler one for a third of it and less."""

    top: float

    @staticmethod
    def over(costs: Iterable[float]) -> "Ramp":
        """From the largest finite cost down."""
        return Ramp(max((c for c in costs if math.isfinite(c)), default=0.0))

    def level(self, cost: float) -> int:
        """0, no colour, to LEVELS."""
        if math.isnan(cost) or cost <= 0 or self.top <= 0:
            return 0
        return LEVELS if math.isinf(cost) else max(0, min(LEVELS, LEVELS + math.ceil(2 * math.log10(cost / self.top))))

    def legend(self, units: Units) -> str:
        """What each colour stands for."""
        if self.top <= 0:
            return ""
        edges = [self.top * 10 ** ((i - LEVELS) / 2) for i in range(LEVELS + 1)]
        steps = [f'<li class="h{i}">up to {units.one(edge)}</li>' for i, edge in enumerate(edges)]
        return f'<ul class="scale heat" aria-label="what the colours mean">{"".join(steps)}</ul>'


def sections(comparison: Comparison, units: Units, order: Sequence[str], chosen: Mapping[str, str]) -> str:
    """The map of all layers under the schemes, in this order; ``chosen``: what each layer became."""
    cells: dict[tuple[str, str], Cell] = {(c.layer, c.candidate): c for c in comparison.cells}
    names = [layer.name for layer in comparison.layers]
    schemes = [name for name in order if name != AS_IT_IS]
    ramp = Ramp.over(c.cost for c in comparison.cells if c.candidate != AS_IT_IS)
    if not names or not schemes:
        return '<p class="soft">No layer was compared under any scheme.</p>'
    if len(names) <= FEW:
        return ramp.legend(units) + _layers(names, schemes, cells, ramp, units, chosen, "every layer", whole=True)
    found = blocks(names)
    folds, labels = [], titles(found)
    for block, members in found.items():
        table = _layers(members, schemes, cells, ramp, units, chosen, labels[block])
        folds.append(fold(f"{labels[block]}: {count(len(members), 'layer')}", table))
    each = fold("Layer by layer", ramp.legend(units) + "".join(folds))
    return _overview(found, schemes, cells, units) + each


def _overview(found: Mapping[str, Sequence[str]], schemes: Sequence[str], cells: Cells, units: Units) -> str:
    """A row a block: its layers' costs added up, and the worst SQNR among them."""
    sums: dict[tuple[str, str], tuple[float, float | None, int]] = {}
    for block, members in found.items():
        for scheme in schemes:
            some = [cells[(layer, scheme)] for layer in members if (layer, scheme) in cells]
            ran = [c for c in some if c.excluded is None]
            ratios = [c.output_sqnr for c in ran if c.output_sqnr is not None]
            known = sum(c.cost for c in ran) if ran else math.nan
            sums[(block, scheme)] = known, min(ratios, default=None), len(some) - len(ran)
    ramp = Ramp.over(cost for cost, _, _ in sums.values())
    rows, labels = [], titles(found)
    for block in found:
        row = []
        for scheme in schemes:
            cost, ratio, left = sums[(block, scheme)]
            if math.isnan(cost):
                row.append('<td class="none">✕ all</td>')
                continue
            aside = f"<small>✕ {left}</small>" if left else ""
            row.append(f'<td class="h{ramp.level(cost)}">{units.one(cost)}<small>{decibels(ratio)}</small>{aside}</td>')
        rows.append(f'<tr><th scope="row">{name(labels[block])}</th>{"".join(row)}</tr>')
    caption = "Costs of a block’s layers added up; below, the worst SQNR among them; ✕ counts excluded layers."
    return ramp.legend(units) + _table("blocks", caption, schemes, rows)


def _layers(
    names: Sequence[str],
    schemes: Sequence[str],
    cells: Cells,
    ramp: Ramp,
    units: Units,
    chosen: Mapping[str, str],
    label: str,
    whole: bool = False,
) -> str:
    """A row a layer, and below the table why cells are crossed out."""
    reasons: dict[str, int] = {}
    rows = []
    for layer in names:
        row = []
        for scheme in schemes:
            star = chosen.get(layer) == scheme
            row.append(_cell(cells.get((layer, scheme)), star, ramp, units, reasons))
        rows.append(f'<tr><th scope="row">{name(layer if whole else split(layer)[1])}</th>{"".join(row)}</tr>')
    caption = "The cost of one layer alone; below, the SQNR of its output." + (" ★ was chosen." if chosen else "")
    notes = "".join(f"<li>{escape(why)}</li>" for why in reasons)
    return _table(label, caption, schemes, rows) + (
        f'<p class="small">✕ Left out because:</p><ol class="small">{notes}</ol>' if notes else ""
    )


def _cell(cell: Cell | None, star: bool, ramp: Ramp, units: Units, reasons: dict[str, int]) -> str:
    picked, mark = (" picked", "★ ") if star else ("", "")
    if cell is None:
        return f'<td class="soft{picked}">{mark}–</td>'
    if cell.excluded is not None:
        return f'<td class="none{picked}">{mark}✕<sup>{reasons.setdefault(cell.excluded, len(reasons) + 1)}</sup></td>'
    known = None if math.isinf(cell.cost) and cell.loss is None and cell.divergence is None else cell.cost
    level = 0 if known is None else ramp.level(known)
    return f'<td class="h{level}{picked}">{mark}{units.one(known)}<small>{decibels(cell.output_sqnr)}</small></td>'


def _table(label: str, caption: str, schemes: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{name(scheme)}</th>' for scheme in schemes)
    table = f'<table><thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<p class="soft small">{escape(caption)}</p>' + scrolling(table, f"costs: {label}", "stay heat")
