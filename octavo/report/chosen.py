"""The choice: the mix as a bar and as a map, why each layer became what it did, and how the search went."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from octavo.analysis.choice import Choice, Decision
from octavo.analysis.comparison import Comparison
from octavo.report.blocks import blocks, split, titles
from octavo.report.heat import FEW
from octavo.report.html import Markup, code, fold, grid, name, scrolling
from octavo.report.numbers import Units, count, megabytes, milliseconds

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_COLUMNS = 16


def section(comparison: Comparison, choice: Choice, unit: Units) -> str:
    """All of it."""
    share = _shares(comparison, choice)
    parts = [_mix(choice, share), _map(choice, list(share))]
    if choice.costliest:
        names = ", ".join(code(layer) for layer in choice.costliest[:8])
        parts.append(f"<p>The layers that cost most: {names}.</p>")
    parts += [f"<p>{escape(note)}</p>" for note in choice.notes]
    parts += [_decisions(choice, unit), _search(choice, unit)]
    return "\n".join(parts)


def _shares(comparison: Comparison, choice: Choice) -> dict[str, float]:
    """Every scheme of the mix with its share of the weights, the largest first."""
    size = {layer.name: layer.parameters for layer in comparison.layers}
    found: Counter[str] = Counter()
    for d in choice.decisions:
        found[d.candidate] += size.get(d.layer, 0)
    total = sum(found.values()) or 1
    return {scheme: parameters / total for scheme, parameters in found.most_common()}


def _letter(index: int) -> str:
    return LETTERS[index] if index < len(LETTERS) else f"{LETTERS[index % 26]}{index // 26}"


def _mix(choice: Choice, share: Mapping[str, float]) -> str:
    """A bar of the weights, and its key."""
    pieces, rows = [], []
    for index, (scheme, part) in enumerate(share.items()):
        pieces.append(f'<span class="s{index % 8}" style="flex:{part:.4f}"></span>')
        some = [d for d in choice.decisions if d.candidate == scheme]
        key = Markup(f'<span class="key s{index % 8}">{_letter(index)}</span>{name(scheme)}')
        rows.append([key, f"{len(some):,}", f"{100 * part:.1f} %", megabytes(sum(d.bytes for d in some))])
    bar = f'<div class="mix" aria-hidden="true">{"".join(pieces)}</div>'
    return bar + grid("the mix", ["runs as", "layers", "of the weights", "MB"], rows)


def _map(choice: Choice, schemes: Sequence[str]) -> str:
    """Blocks × their layers, the scheme's letter in each; only of models whose blocks are alike."""
    letters = {d.layer: schemes.index(d.candidate) for d in choice.decisions}
    found = {block: names for block, names in blocks(letters).items() if block}
    columns = list(dict.fromkeys(split(layer)[1] for names in found.values() for layer in names))
    if len(schemes) < 2 or len(found) < 2 or len(columns) > MOST_COLUMNS:
        return ""
    rows, labels = [], titles(found)
    for block, names in found.items():
        inside = {split(layer)[1]: letters[layer] for layer in names}
        cells = "".join(
            f'<td class="s{inside[c] % 8}">{_letter(inside[c])}</td>' if c in inside else "<td></td>" for c in columns
        )
        rows.append(f'<tr><th scope="row">{name(labels[block])}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{name(column)}</th>' for column in columns)
    table = f'<table><thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    wide = scrolling(table, "map of the mix", "stay map")
    return fold("The mix as a map, by the letters above", wide, len(rows) <= FEW)


def _decisions(choice: Choice, unit: Units) -> str:
    """Why every layer became what it did, a fold a block."""
    made = {d.layer: d for d in choice.decisions}
    found = blocks(made)
    folds, labels = [], titles(found)
    for block, names in found.items():
        some = [made[layer] for layer in names]
        became = Counter(d.candidate for d in some).most_common()
        told = ", ".join(f"{times} × {scheme}" for scheme, times in became[:2]) + (", …" if len(became) > 2 else "")
        folds.append(fold(f"{labels[block]}: {told}", _decided(some, unit, labels[block]), len(made) <= FEW // 2))
    return fold(f"Why each layer became what it did: {count(len(made), 'layer')}", "\n".join(folds), len(folds) == 1)


def _decided(some: Sequence[Decision], unit: Units, label: str) -> str:
    rows = [
        [
            name(split(d.layer)[1]),
            name(d.candidate),
            d.reason,
            unit.one(d.cost),
            megabytes(d.bytes),
            milliseconds(d.seconds),
        ]
        for d in some
    ]
    heads = ["layer", "runs as", "because", "cost", "MB", "time"]
    return grid(f"choices: {label}", heads, rows, prose=(1, 2))


def _search(choice: Choice, unit: Units) -> str:
    if not choice.steps:
        return ""
    rows = [
        [
            step.what,
            unit.said(step.predicted),
            unit.said(step.loss, step.error),
            megabytes(step.bytes),
            milliseconds(step.seconds),
            "yes" if step.within else "no",
        ]
        for step in choice.steps
    ]
    heads = ["tried", "foretold", "measured", "MB", "layers’ time", "within the budget"]
    return fold(f"How the search went: {count(len(rows), 'mix', 'mixes')} measured", grid("the search", heads, rows))
