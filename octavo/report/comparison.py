"""The page that people show each other: what 8 bits cost a model, by scheme and by layer, and what was chosen.

One file without scripts: everything scrolls and folds with what HTML has, so it works offline, on paper, with a
keyboard and with JavaScript off. Names of models and layers come from other people's files and are escaped.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version

from octavo.analysis.choice import Choice
from octavo.analysis.comparison import AS_IT_IS, Comparison
from octavo.analysis.magnitudes import LayerMagnitudes
from octavo.analysis.outliers import Outliers
from octavo.ptq.rules import rules_to_json
from octavo.report import chosen, heat, number_lines, outcomes, outlier_map, words
from octavo.report.html import Markup, code, fold, name, text, whole
from octavo.report.numbers import Units, count, megabytes, milliseconds, short, units


def page(
    comparison: Comparison,
    choice: Choice | None = None,
    magnitudes: Sequence[LayerMagnitudes] = (),
    outliers: Outliers | None = None,
    *,
    command: str = "",
    facts: Mapping[str, str] | None = None,
) -> bytes:
    """The page as HTML. ``magnitudes``: of as many layers as there are; ``outliers``: if somebody looked for them.

    ``command`` is what makes this page again; ``facts``: more to say about how it was made, in words by what they are
    called, as a perplexity on other text.
    """
    unit = units(comparison)
    order = outcomes.cheapest_first(comparison)
    picks = {} if choice is None else {d.layer: d.candidate for d in choice.decisions}
    costs = outcomes.section(comparison, choice, unit, order)
    mix = "" if choice is None else chosen.section(comparison, choice, unit)
    sections = {
        "trade-off": ("Trade-off", "What each scheme costs and saves", costs),
        "chosen": ("Choice", "What was chosen, and why", mix),
        "layers": ("Layers", "Which layer suffers from what", _layers(comparison, unit, order, picks)),
        "numbers": ("Numbers", "The numbers in each layer", number_lines.section(comparison, magnitudes)),
        "outliers": ("Outliers", "Where the outliers are", outlier_map.section(outliers)),
        "made": ("Repeat it", "How this was made, and again", _made(comparison, choice, command, facts or {})),
        "words": ("Glossary", "What the words mean", words.glossary()),
    }
    present = {key: section for key, section in sections.items() if section[2]}
    links = "".join(f'<li><a href="#{key}">{short_title}</a></li>' for key, (short_title, _, _) in present.items())
    parts = [
        '<a class="skip" href="#main">To the content</a>',
        f'<header><p class="brand">Octavo · a model in 8 bits</p><h1>{name(comparison.model)}</h1>',
        f'<p class="verdict">{escape(_verdict(comparison, choice, unit))}</p>',
        _facts(comparison, choice, unit),
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
        f'<main id="main">{words.reading(present.keys())}',
    ]
    for key, (_, heading, body) in present.items():
        parts.append(f'<section aria-labelledby="{key}"><h2 id="{key}">{heading}</h2>{body}</section>')
    parts.append(f"</main><footer>Octavo {escape(_version('octavo'))}. One file, no scripts, nothing fetched.</footer>")
    return whole(f"{comparison.model} in 8 bits", parts)


def _verdict(comparison: Comparison, choice: Choice | None, unit: Units) -> str:
    """The page in a sentence."""
    if choice is not None and choice.verdict:
        return choice.verdict
    tried = []
    for outcome in comparison.outcomes:
        loss = outcomes.increase(comparison, outcome)
        if outcome.candidate != AS_IT_IS and outcome.excluded is None and loss is not None and math.isfinite(loss):
            tried.append((outcome, loss))
    if not tried:
        return "No scheme was judged on the whole model; its layers were compared one by one."
    best, least = min(tried, key=lambda pair: pair[1])
    said = f"Of {count(len(tried), 'scheme')}, {best.candidate} costs least: {unit.whole} {unit.said(least)}"
    if best.bytes:
        said += f", {comparison.bytes / best.bytes:.1f} times smaller"
    base = outcomes.outcome_of(comparison, AS_IT_IS)
    timed = [(outcome.seconds, outcome, loss) for outcome, loss in tried if outcome.seconds]
    if timed and base is not None and base.seconds:
        seconds, quick, loss = min(timed, key=lambda found: found[0])
        pace = f"{base.seconds / seconds:.1f} times as fast"
        said += f", and {pace} here" if quick is best else ""
        said += f". {quick.candidate} is the fastest here, {pace}, for {unit.said(loss)}" if quick is not best else ""
    return said + "."


def _facts(comparison: Comparison, choice: Choice | None, unit: Units) -> str:
    """A few figures, large."""
    tiles = _before(comparison) if choice is None else _after(comparison, choice, unit)
    cards = "".join(
        f"<div><dt>{escape(what)}</dt><dd><strong>{escape(figure)}</strong><span>{escape(more)}</span></dd></div>"
        for what, figure, more in tiles
    )
    return f'<dl class="facts">{cards}</dl>'


def _before(comparison: Comparison) -> list[tuple[str, str, str]]:
    tiles = [("Size as it is", f"{megabytes(comparison.bytes)} MB", count(len(comparison.layers), "layer"))]
    if comparison.perplexity is not None:
        tiles.append(("Perplexity as it is", f"{comparison.perplexity:.4g}", "lower is better"))
    elif comparison.loss is not None:
        tiles.append(("Loss as it is", short(comparison.loss), "lower is better"))
    schemes = sum(c.scheme is not None for c in comparison.candidates)
    tiles.append(("Compared", count(schemes, "scheme"), f"{count(len(comparison.cells), 'measurement')} of layers"))
    return tiles


def _after(comparison: Comparison, choice: Choice, unit: Units) -> list[tuple[str, str, str]]:
    what, budget = unit.whole.capitalize(), unit.said(choice.budget).lstrip("+")
    tiles = [(what, unit.said(choice.increase), f"{'within' if choice.met else 'over'} the budget of {budget}")]
    after = outcomes.bytes_after(comparison, choice)
    if after > 0:
        sizes = f"{megabytes(comparison.bytes)} → {megabytes(after)} MB"
        tiles.append(("Times smaller", f"{comparison.bytes / after:.2f}", sizes))
    if choice.seconds_before and choice.seconds_after:
        layers = f"layers: {milliseconds(choice.seconds_before)} → {milliseconds(choice.seconds_after)}"
        tiles.append(("Times as fast here", f"{choice.seconds_before / choice.seconds_after:.2f}", layers))
    eight = sum(d.candidate != AS_IT_IS for d in choice.decisions)
    return [*tiles, ("Layers in 8 bits", f"{eight:,} of {len(choice.decisions):,}", _where(choice))]


def _where(choice: Choice) -> str:
    return "for this machine" if choice.engine == "here" else f"for {choice.engine}"


def _layers(comparison: Comparison, unit: Units, order: Sequence[str], picks: Mapping[str, str]) -> str:
    said = (
        "<p>Each cell is one layer under one scheme while all others stay as they are. The first figure is what that "
        f"costs: {escape(unit.part)}. The second is the SQNR, by how much the layer’s output stands above its rounding "
        "errors.</p>"
    )
    unseen = [layer.name for layer in comparison.layers if not layer.calls]
    if unseen:
        names = ", ".join(code(layer) for layer in unseen[:5]) + (" …" if len(unseen) > 5 else "")
        said += f"<p>No data came to {count(len(unseen), 'layer')}: {names}.</p>"
    return said + heat.sections(comparison, unit, order, picks)


def _made(comparison: Comparison, choice: Choice | None, command: str, facts: Mapping[str, str]) -> str:
    parts = []
    if command:
        parts.append(f'<p>This command makes the page again:</p><pre tabindex="0"><code>{escape(command)}</code></pre>')
    packages = ", ".join(f"{package} {_version(package)}" for package in ("octavo", "torch", "transformers"))
    told = {
        "Judged on": comparison.data,
        **facts,
        "Machine": comparison.machine,
        "Versions": f"{packages}, Python {platform.python_version()}",
    }
    if comparison.loss is not None:
        worth = "" if comparison.perplexity is None else f" (perplexity {comparison.perplexity:.5g})"
        told["Loss as it is"] = f"{comparison.loss:.4f}{worth}"
    if choice is not None:
        told["Looked for"] = f"the mix of least {'time' if choice.objective == 'time' else 'size'}, {_where(choice)}"
    if comparison.seconds:
        told["It took"] = ", ".join(f"{part} {short(seconds)} s" for part, seconds in comparison.seconds.items())
    entries = "".join(f"<dt>{escape(what)}</dt><dd>{text(how)}</dd>" for what, how in told.items() if how)
    parts.append(f'<dl class="made">{entries}</dl>')
    parts += [f"<p>{escape(note)}</p>" for note in comparison.notes]
    if choice is not None:
        rules = ",\n".join(json.dumps(rule, ensure_ascii=False) for rule in rules_to_json(choice.rules))
        listed = Markup(f'<pre tabindex="0"><code>[\n{escape(rules)}\n]</code></pre>')
        parts.append(fold("The mix as rules, to edit and give back", listed))
    return "\n".join(parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
