"""The whole model under every scheme: the trade-off as a plot and as a table."""

import math
from collections.abc import Sequence

from octavo.analysis.choice import Choice
from octavo.analysis.comparison import AS_IT_IS, Comparison, Outcome
from octavo.core.formats import IntegerFormat
from octavo.report import tradeoff
from octavo.report.html import grid, name
from octavo.report.numbers import Units, count, megabytes, times
from octavo.report.tradeoff import Kind, Point

MIX = "chosen mix"


def outcome_of(comparison: Comparison, scheme: str) -> Outcome | None:
    """The whole model under that scheme, if it was tried."""
    return next((o for o in comparison.outcomes if o.candidate == scheme), None)


def increase(comparison: Comparison, outcome: Outcome) -> float | None:
    """By how much the whole model's loss grows; its divergence where nothing else is known."""
    if outcome.candidate == AS_IT_IS:
        return 0.0
    if outcome.loss is not None and comparison.loss is not None:
        return outcome.loss - comparison.loss
    return outcome.divergence


def cheapest_first(comparison: Comparison) -> list[str]:
    """All candidates: as it is, then by what they cost the whole model; those without a figure last."""
    cost = {o.candidate: increase(comparison, o) for o in comparison.outcomes if o.excluded is None}

    def key(scheme: str) -> float:
        found = cost.get(scheme)
        return math.inf if found is None or math.isnan(found) else found

    return sorted((c.name for c in comparison.candidates), key=lambda scheme: (scheme != AS_IT_IS, key(scheme)))


def bytes_after(comparison: Comparison, choice: Choice) -> int:
    """The whole model's bytes in the chosen mix."""
    return comparison.bytes - choice.bytes_before + choice.bytes_after


def time_after(comparison: Comparison, choice: Choice) -> float | None:
    """The mix's time as a multiple of the float model's: measured, or a whole pass less what its layers save."""
    if choice.pace_before and choice.pace_after:
        return choice.pace_after / choice.pace_before
    base = outcome_of(comparison, AS_IT_IS)
    if choice.seconds_before is None or choice.seconds_after is None or base is None or not base.seconds:
        return None
    after = base.seconds - choice.seconds_before + choice.seconds_after
    return after / base.seconds if after > 0 else None


def section(comparison: Comparison, choice: Choice | None, unit: Units, order: Sequence[str]) -> str:
    """Plot and table; empty if nothing was judged on the whole model."""
    points, rows = [], []
    base = outcome_of(comparison, AS_IT_IS)
    before = base.seconds if base is not None and base.seconds else None
    for scheme in order:
        outcome = outcome_of(comparison, scheme)
        if outcome is None:
            continue
        if outcome.excluded is not None:
            rows.append([name(scheme), "✕", "", "", outcome.excluded])
            continue
        loss = increase(comparison, outcome)
        size = comparison.bytes if scheme == AS_IT_IS and outcome.bytes is None else outcome.bytes
        time = outcome.seconds / before if outcome.seconds is not None and before else None
        points += _point(scheme, unit.increase(loss), size, time, _kind(comparison, scheme))
        error = None if scheme == AS_IT_IS else outcome.error
        left = f"{count(len(outcome.left), 'layer stays', 'layers stay')} as they are" if outcome.left else ""
        rows.append([name(scheme), unit.said(loss, error), megabytes(size), times(time), left])
    budget, note, chosen = None, "", range(0)
    if choice is not None:
        size, time = bytes_after(comparison, choice), time_after(comparison, choice)
        budget = unit.increase(choice.budget)
        budget = budget if budget is not None and math.isfinite(budget) else None
        points += _point(MIX, unit.increase(choice.increase), size, time, "chosen")
        chosen = range(len(rows), len(rows) + 1)
        rows.append([f"★ {MIX}", unit.said(choice.increase, choice.error), megabytes(size), times(time), ""])
        if time is not None and not choice.pace_after:
            note = " The time of the mix is a whole pass less what its layers save."
    if not rows:
        return ""
    plots = ""
    if points:
        drawn = (tradeoff.draw(points, unit.whole, unit.unit, budget, narrow) for narrow in (False, True))
        told = f"Further down is more faithful, further left is smaller or faster.{note} The table has the figures."
        plots = f"<figure>{''.join(drawn)}<figcaption>{told}</figcaption></figure>"
    heads = ["scheme", unit.whole, "MB", "time here, × float", "remarks"]
    return plots + grid("schemes", heads, rows, prose=(4,), chosen=chosen)


def _point(scheme: str, cost: float | None, size: int | None, time: float | None, kind: Kind) -> list[Point]:
    if cost is None or not math.isfinite(cost) or size is None:
        return []
    return [Point(scheme, cost, size / 1e6, time if time is not None and math.isfinite(time) else None, kind)]


def _kind(comparison: Comparison, candidate: str) -> Kind:
    """Whose numbers a scheme uses."""
    scheme = comparison.candidate(candidate).scheme
    if scheme is None:
        return "float"
    sides = {isinstance(how.format, IntegerFormat) for how in (scheme.weight, scheme.input) if how is not None}
    return "mixed" if len(sides) > 1 else "int8" if True in sides else "fp8"
