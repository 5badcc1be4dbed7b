"""The fastest or smallest mix of schemes, a layer at a time, that keeps a budget of loss.

``compare`` says what every layer costs under every scheme when it alone is quantized. These costs nearly add up, so the
best mix by their sum is a knapsack (``knapsack``), as in HAWQ-V3 (2011.10680). Nearly: errors of different layers meet.
So every mix that the sum proposes is built with ``quantize_`` and measured on the search's data. Where the truth is
above the budget the sum gets less to spend, where it is below more, until the two meet. What is given back was
measured, never only foretold. The first mix is tried with weights rounded by data as well; if that helps, all are.

A loss may grow less by the luck of the sample. So a mix keeps the budget only if the measured increase and twice its
standard error do, or, of a language model, the increase and the divergence. For where rounding's noise knows nothing of
the data, the divergence *is* the increase to be expected, and it scatters far less.

Times are measured, and so they scatter: two times of one layer that differ by less than the spread of their runs count
as equal, and then the fewer bytes decide. So noise leaves no layer in float.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import nn

from octavo.analysis import engines, knapsack
from octavo.analysis.choice import Choice, Decision, Objective, Step
from octavo.analysis.compare import Table, compared
from octavo.analysis.comparison import AS_IT_IS, Candidate, Cell, Comparison
from octavo.analysis.groups import Unit, Way, joined, ways
from octavo.analysis.judge import Loss, Shift
from octavo.analysis.knapsack import Option
from octavo.analysis.rule_writing import rules_for
from octavo.analysis.verdict import verdict
from octavo.calibration.batches import Call, Track
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.nn.swap import Layer
from octavo.ptq import stacks
from octavo.ptq.rules import Rule

STEPS = 8  # mixes that are measured
NEAR = 0.9  # a mix that uses this much of the budget is near enough to the best
CLOSE = 1.1  # what may be spent and what may not are near enough to stop
SMALLER = 1e-3  # how much the other objective counts, where the first says nothing
FLOAT = Candidate(None)
GPTQ = "weights rounded by data (gptq)"


@dataclass(frozen=True)
class Mix:
    """A candidate for every group, its sum of costs, and what was measured of it."""

    taken: tuple[int, ...]
    predicted: float
    shift: Shift
    rules: tuple[Rule, ...]
    pace: tuple[float, float] | None = None  # seconds of the model and of this mix for the largest batch

    @property
    def increase(self) -> float:
        """By how much the loss grew, or the results moved where there is no loss."""
        known = self.shift.distance if self.shift.increase is None else self.shift.increase
        return math.inf if known is None or not self.shift.finite else known

    @property
    def bound(self) -> float:
        """What has to be within the budget: the increase, and what it may be lower by than it would be without luck."""
        if self.shift.increase is None:
            return self.increase
        luck = 2 * self.shift.error
        if self.shift.distance is not None:
            luck = min(luck, max(0.0, self.shift.distance - self.increase))
        return self.increase + luck


def choose(
    model: nn.Module,
    data: Iterable[Any],
    max_loss_increase: float = 0.005,
    objective: Objective = "time",
    engine: str = "here",
    *,
    candidates: Sequence[Scheme | str | Candidate | None] | None = None,
    calibration: Iterable[Any] | None = None,
    comparison: Comparison | None = None,
    cells_on: int | None = 1,
    rounding: bool = True,
    hardware: str | None = None,
    loss: Loss | None = None,
    call: Call | None = None,
    track: Track | None = None,
) -> Choice:
    """Rules for ``quantize_`` that keep the increase of the loss within ``max_loss_increase``.

    The loss is in nats a token for causal language models, so 0.005 are half a percent of perplexity; for others what
    ``loss(output, batch)`` gives, or the share of noise in the outputs. ``data``: batches to search on;
    ``calibration``: others for what looks at data (None: the same). ``objective``: the least ``time`` or the fewest
    ``bytes``. ``engine``: here, vllm, transformers, onnx or llama.cpp, on ``hardware`` (a GPU's name); it restricts the
    candidates. ``candidates``: others than the engine's; None among them leaves a layer as it is, and if there are some
    without None, every layer gets one of them. ``comparison``: what ``compare`` found for them before; else cells are
    measured on ``cells_on`` batches. ``rounding``: try weights rounded by ``calibration``'s data, if there is some:
    what is fitted to data must not be judged by it.

    A budget that no mix keeps gives a ``Choice`` with ``met=False``, the best that was found. Raises ``OctavoError``
    for what ``compare`` refuses, and for an engine or candidates that leave nothing to choose.
    """
    if not max_loss_increase >= 0:
        raise OctavoError(f"max_loss_increase is 0 or more, such as 0.005, not {max_loss_increase}")
    runs = engines.get(engine).on(hardware)
    wanted = [*runs.candidates, None] if candidates is None else candidates
    floats = any(c is None or c == FLOAT for c in wanted)
    schemes = [c for c in wanted if c is not None]
    table = Table(model, data, schemes, calibration=calibration, cells_on=cells_on, loss=loss, call=call)
    engines.runnable(runs, table.layers, table.candidates)
    if comparison is None:
        comparison = compared(table, track=track)
    rounding = rounding and table.calibration is not table.batches
    return _Search(table, comparison, runs, objective, max_loss_increase, floats, rounding).choice(track)


class _Search:
    """Groups of layers, what may become of each, and the mixes that were measured."""

    def __init__(
        self,
        table: Table,
        comparison: Comparison,
        engine: engines.Engine,
        objective: Objective,
        budget: float,
        floats: bool,
        rounding: bool,
    ) -> None:
        self.table, self.comparison, self.engine = table, comparison, engine
        self.objective, self.budget, self.floats = objective, budget, floats
        self.rounding = rounding  # weights by data: to be tried, and later whether it helps
        self.candidates = table.candidates
        self.named = {candidate.name: candidate for candidate in self.candidates}
        self.cells = {(cell.layer, cell.candidate): cell for cell in comparison.cells}
        self.runs = {layer.name: max(1, layer.calls) for layer in comparison.layers}
        self.layers = table.layers
        self.by_name = {layer.name: layer for layer in self.layers}
        for layer, name in product(self.by_name, self.named):
            if (layer, name) not in self.cells:
                raise OctavoError(f"the comparison is another one: it does not know {layer} under {name}")
        self.times = {name: _evened([self.cells[name, c] for c in self.named]) for name in self.by_name}
        self.groups = self._groups()
        self.options = [self._options(group) for group in self.groups]
        self.notes = list(table.notes)
        self.steps: list[Step] = []

    def choice(self, track: Track | None) -> Choice:
        """Search, and say what was found."""
        return self._told(*self._search(track))

    def _groups(self) -> list[list[Unit]]:
        """Units of layers that the engine runs as one, and groups of those that are smoothed together."""
        stacked = stacks.siblings(self.by_name) if self.engine.stacked else []
        units = joined(self.by_name, stacked)
        groups = joined(self.by_name, [*units, *(pair.readers for pair in self.table.smoothing.pairs)])
        return [[unit for unit in units if unit[0] in group] for group in groups]

    def _options(self, group: list[Unit]) -> list[Way]:
        """What may become of a group, the cheapest first; it stays as it is if nothing of what is wanted fits it."""
        found = ways(group, self._offers)
        if not found:
            cells = [self._cell(self.by_name[name], FLOAT) for unit in group for name in unit]
            found = [Way((FLOAT,) * len(group), Option(0.0, self._weight(cells)))]
        return found

    def _offers(self, unit: Unit) -> list[tuple[Candidate, Option]]:
        """What may become of layers that get one candidate."""
        found = []
        for candidate in self.candidates:
            cells = [self._cell(self.by_name[name], candidate) for name in unit]
            if any(cell.excluded for cell in cells) or (candidate == FLOAT and not self.floats):
                continue
            found.append((candidate, Option(sum(max(0.0, cell.cost) for cell in cells), self._weight(cells))))
        if not found:
            found.append((FLOAT, Option(0.0, self._weight([self._cell(self.by_name[name], FLOAT) for name in unit]))))
        return found

    def _cell(self, layer: Layer, candidate: Candidate) -> Cell:
        cell = self.cells[layer.name, candidate.name]
        if cell.excluded is None and candidate.scheme is not None:
            why = self.engine.obstacle(layer, candidate.scheme)
            return cell if why is None else replace(cell, excluded=why)
        return cell

    def _weight(self, cells: Sequence[Cell]) -> float:
        """What layers take of the objective, in shares of all layers as they are; a little of the other's."""
        time = self._seconds(cells, self.times) / self._total(self._seconds)
        size = self._bytes(cells) / self._total(self._bytes)
        return time + SMALLER * size if self.objective == "time" else size + SMALLER * time

    def _total(self, of: Callable[[Sequence[Cell]], float]) -> float:
        return of([self.cells[name, AS_IT_IS] for name in self.by_name]) or 1.0

    def _seconds(self, cells: Sequence[Cell], times: Mapping[str, Mapping[str, float]] | None = None) -> float:
        """Seconds measured here, or, for another engine, multiplications times what its formats take."""
        total = 0.0
        for cell in cells:
            rate = self.engine.rate(self.named[cell.candidate].scheme)
            if rate is not None:
                once = rate * self.by_name[cell.layer].weight.numel()
            else:
                once = (cell.seconds or 0.0) if times is None else times[cell.layer].get(cell.candidate, 0.0)
            total += once * self.runs[cell.layer]
        return total

    def _bytes(self, cells: Sequence[Cell]) -> float:
        return float(sum(cell.bytes or 0 for cell in cells))

    def _search(self, track: Track | None) -> tuple[Mix, bool]:
        """The lightest measured mix within the budget; else the one that comes nearest."""
        bare = [[way.option for way in options] for options in self.options]
        spend, low, high = self.budget, 0.0, math.inf
        found: dict[tuple[int, ...], Mix] = {}
        best: Mix | None = None
        turns = list(range(STEPS))
        for _ in track(turns, "searching") if track else turns:
            taken = knapsack.solve(bare, spend)
            if taken is None:  # nothing is that cheap: the cheapest of all
                taken = [0] * len(bare)
                low, spend = spend, sum(options[0].cost for options in bare)
            mix = found.get(tuple(taken)) or self._measured(tuple(taken), f"costs of {spend:.3g} to spend")
            known = tuple(taken) in found
            found[mix.taken] = mix
            if mix.bound <= self.budget:
                low = max(low, spend)
                best = mix if best is None or self._of(mix) < self._of(best) else best
            else:
                spend = min(spend, mix.predicted)  # more was not spent
                high = min(high, spend)
            if self._done(mix, known, low, high):
                break
            spend = self._next(mix, spend, low, high)
        if best is not None and (any(rule.scheme for rule in best.rules) or self._of(best) <= self._least):
            return best, True
        nearest = self._nearest(found.values())
        return nearest, nearest.bound <= self.budget

    @property
    def _least(self) -> float:
        """The weight of the lightest mix that there is, at any cost."""
        return sum(min(way.option.weight for way in options) for options in self.options)

    def _done(self, mix: Mix, known: bool, low: float, high: float) -> bool:
        within = mix.bound <= self.budget
        cheapest = not within and not any(mix.taken)
        lightest = within and self._of(mix) <= self._least
        near = within and mix.bound >= NEAR * self.budget
        return cheapest or lightest or near or high <= low * CLOSE or (known and high < math.inf)

    def _next(self, mix: Mix, spend: float, low: float, high: float) -> float:
        """What the sum may spend next: as much as the last mix's truth allows, but between what is known."""
        ratio = self.budget / mix.bound if mix.bound > 0 else 4.0
        wanted = spend * min(4.0, max(0.1, ratio * 0.95))
        if high < math.inf and low > 0:
            return min(max(wanted, low + 0.2 * (high - low)), high - 0.2 * (high - low))
        return min(wanted, 0.9 * high)

    def _nearest(self, found: Iterable[Mix]) -> Mix:
        """Of mixes with something quantized the one that costs least, and what costs least by the sum."""
        cheapest = tuple(
            next((at for at, way in enumerate(options) if any(c.scheme for c in way.candidates)), 0)
            for options in self.options
        )
        known = [mix for mix in found if any(rule.scheme for rule in mix.rules)]
        if not any(mix.taken == cheapest for mix in known):
            known.append(self._measured(cheapest, "all layers, the cheapest scheme for each"))
        return min(known, key=lambda mix: mix.bound)

    def _measured(self, taken: tuple[int, ...], what: str) -> Mix:
        """A mix as it will be: with weights rounded by data if that helps, which the first mix shows."""
        rules = tuple(rules_for(self.table.model, self.layers, self._decided(taken)))
        if not self.rounding or all(rule.scheme is None for rule in rules):
            return self._judged(taken, what, rules)
        by_data = tuple(rule if rule.scheme is None else replace(rule, rounding="gptq") for rule in rules)
        known = any(GPTQ in step.what for step in self.steps)
        nearest = None if known else self._judged(taken, what, rules)
        try:
            mix = self._judged(taken, f"{what}, {GPTQ}" if known else f"the same, {GPTQ}", by_data)
        except OctavoError as error:
            self.notes.append(f"weights are rounded to the nearest: {error}")
            mix = self._judged(taken, what, rules) if nearest is None else nearest
        if nearest is not None and not _nearer(mix, nearest):
            self.rounding, mix = False, nearest
        return mix

    def _judged(self, taken: tuple[int, ...], what: str, rules: tuple[Rule, ...]) -> Mix:
        predicted = sum(options[at].option.cost for at, options in zip(taken, self.options, strict=True))
        shift, pace = Shift(1, 0.0, 0.0, 0.0), None
        if any(rule.scheme for rule in rules):
            model = self.table.mix(rules)
            shift, pace = self.table.shift(model), self.table.pace(model)
        mix = Mix(taken, predicted, shift, rules, pace)
        self.steps.append(
            Step(
                what=what,
                predicted=predicted,
                loss=mix.increase,
                divergence=shift.distance,
                error=shift.error,
                bytes=int(self._bytes(self._cells_of(mix))),
                seconds=self._seconds(self._cells_of(mix)) if self.engine.row is None else None,
                within=mix.bound <= self.budget,
            )
        )
        return mix

    def _decided(self, taken: Sequence[int]) -> dict[str, Candidate]:
        return {
            name: candidate
            for group, options, at in zip(self.groups, self.options, taken, strict=True)
            for unit, candidate in zip(group, options[at].candidates, strict=True)
            for name in unit
        }

    def _of(self, mix: Mix) -> float:
        return sum(options[at].option.weight for at, options in zip(mix.taken, self.options, strict=True))

    def _cells_of(self, mix: Mix) -> list[Cell]:
        decided = self._decided(mix.taken)
        return [self.cells[name, decided[name].name] for name in self.by_name]

    def _told(self, best: Mix, met: bool) -> Choice:
        decided = self._decided(best.taken)
        here = self.engine.row is None
        before, after = [self.cells[name, AS_IT_IS] for name in self.by_name], self._cells_of(best)
        decisions = tuple(self._decision(layer, decided[layer.name]) for layer in self.layers)
        costliest = sorted((d for d in decisions if d.candidate != AS_IT_IS), key=lambda d: -d.cost)
        choice = Choice(
            rules=best.rules,
            verdict="",
            engine=self.engine.name,
            objective=self.objective,
            budget=self.budget,
            met=met,
            loss=self.comparison.loss if self.comparison.loss is not None else 0.0,
            increase=best.increase,
            error=best.shift.error,
            predicted=best.predicted,
            divergence=best.shift.distance,
            bytes_before=int(self._bytes(before)),
            bytes_after=int(self._bytes(after)),
            seconds_before=self._seconds(before) if here else None,
            seconds_after=self._seconds(after) if here else None,
            pace_before=best.pace[0] if best.pace and here else None,
            pace_after=best.pace[1] if best.pace and here else None,
            steps=tuple(self.steps),
            decisions=decisions,
            costliest=tuple(decision.layer for decision in costliest[:5]),
            notes=tuple(self.notes),
        )
        return replace(
            choice, verdict=verdict(choice, self.comparison.perplexity is not None, self.comparison.loss is None)
        )

    def _decision(self, layer: Layer, candidate: Candidate) -> Decision:
        cell = self.cells[layer.name, candidate.name]
        return Decision(
            layer=layer.name,
            candidate=candidate.name,
            reason=self._reason(layer, candidate),
            cost=cell.cost,
            bytes=cell.bytes or 0,
            seconds=cell.seconds,
        )

    def _reason(self, layer: Layer, candidate: Candidate) -> str:
        """Why a layer became what it is: what lighter candidates would have cost."""
        word = "fastest" if self.objective == "time" else "smallest"
        others = [self._cell(layer, c) for c in self.candidates if c != FLOAT or self.floats]
        possible = [cell for cell in others if cell.excluded is None]
        if not any(cell.candidate != AS_IT_IS for cell in possible):
            return f"it stays: {next((cell.excluded for cell in others if cell.excluded), 'nothing suits it')}"
        lightest = min(possible, key=lambda cell: self._weight([cell]))
        own = self.cells[layer.name, candidate.name].cost
        if lightest.candidate == candidate.name:
            return f"the {word}, at a cost of {own:.2g}"
        if candidate != FLOAT and lightest.candidate == AS_IT_IS:
            return f"the cheapest in 8 bits, though the {word} is as it is"
        if self._cell(layer, candidate).excluded is None and lightest.cost <= own:
            return f"as those that it runs with; alone it could be {lightest.candidate}"
        return f"the {word}, {lightest.candidate}, would cost {lightest.cost:.2g} of {self.budget:.2g}, this {own:.2g}"


def _nearer(mix: Mix, other: Mix) -> bool:
    """Whether a mix's results are nearer to the model's than another's."""
    if mix.shift.distance is None or other.shift.distance is None:
        return mix.bound < other.bound
    return mix.shift.distance < other.shift.distance


def _evened(cells: Iterable[Cell]) -> dict[str, float]:
    """By candidate one layer's times; those that differ by less than their spread are the same."""
    known = sorted((cell.seconds, cell.spread or 0.0, cell.candidate) for cell in cells if cell.seconds is not None)
    found: dict[str, float] = {}
    first, slack = 0.0, 0.0
    for seconds, spread, candidate in known:
        if seconds > first * (1 + max(slack, spread)):
            first, slack = seconds, spread
        found[candidate] = first
    return found
