"""What may become of layers that cannot be decided each by itself.

Layers that an engine runs as one get one candidate. Layers that read one smoothed result share an α, but no format:
``q_proj`` may be INT8 and ``v_proj`` E4M3, or stay as it is. So for every α a group may become any combination of what
its units may; those that another beats in cost and in weight are dropped.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from octavo.analysis.comparison import Candidate
from octavo.analysis.knapsack import Option

MOST = 100  # combinations of one group that are kept

#: By name the layers that get one candidate.
Unit = tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """A candidate for every unit of a group, and what that costs and weighs."""

    candidates: tuple[Candidate, ...]
    option: Option


def joined(names: Iterable[str], sets: Iterable[Iterable[str]]) -> list[Unit]:
    """All names, in their order, those together that stand in one of the sets, or in sets that overlap."""
    position = {name: number for number, name in enumerate(names)}
    group_of: dict[str, Unit] = {name: (name,) for name in position}
    for wanted in sets:
        known = {x for name in wanted if name in group_of for x in group_of[name]}
        merged = tuple(sorted(known, key=position.__getitem__))
        group_of |= dict.fromkeys(merged, merged)
    return list(dict.fromkeys(group_of.values()))


def ways(units: Sequence[Unit], offers: Callable[[Unit], Sequence[tuple[Candidate, Option]]]) -> list[Way]:
    """What may become of a group, the cheapest first; ``offers``: what may become of a unit. Empty if nothing may."""
    offered = [offers(unit) for unit in units]
    found: list[Way] = []
    for alpha in dict.fromkeys([None, *(candidate.smooth for offer in offered for candidate, _ in offer)]):
        front = [Way((), Option(0.0, 0.0))]
        for offer in offered:
            front = _best(
                Way((*way.candidates, candidate), _sum(way.option, option))
                for way in front
                for candidate, option in offer
                if candidate.scheme is None or candidate.smooth == alpha
            )
        found += front
    return _best(found)


def _sum(one: Option, other: Option) -> Option:
    return Option(one.cost + other.cost, one.weight + other.weight)


def _best(found: Iterable[Way]) -> list[Way]:
    """Those that no other beats, the cheapest first; of very many some, evenly."""
    front: list[Way] = []
    for way in sorted(found, key=lambda way: (way.option.cost, way.option.weight)):
        if not front or way.option.weight < front[-1].option.weight:
            front.append(way)
    if len(front) <= MOST:
        return front
    return [front[number * (len(front) - 1) // (MOST - 1)] for number in range(MOST)]
