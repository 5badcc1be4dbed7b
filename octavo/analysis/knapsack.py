"""One option for each of many groups, so that the costs keep a budget and the weights are as small as can be.

The multiple-choice knapsack. Costs are rounded up to a fine grid of the budget, so that what is found never exceeds it,
and dynamic programming over the grid is exact: there is no lighter choice within the budget less the rounding, which is
at most a step a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo.errors import OctavoError

STEPS = 20_000


@dataclass(frozen=True)
class Option:
    """What taking this option costs (infinite: it cannot be taken), and what it weighs."""

    cost: float
    weight: float


def solve(groups: Sequence[Sequence[Option]], budget: float, steps: int = STEPS) -> list[int] | None:
    """For each group the option to take, or None if no choice keeps the budget. Of equal weights the cheaper one."""
    if budget < 0 or any(option.cost < 0 for group in groups for option in group):
        raise OctavoError("budgets and costs are 0 or more")
    grid = budget / steps
    best = np.zeros(steps + 1)  # the least weight for every part of the budget, exactly used up or not
    taken = np.empty((len(groups), steps + 1), dtype=np.int16)
    prices = []
    for number, group in enumerate(groups):
        price = [_price(option.cost, grid, steps) for option in group]
        table = np.full((len(group), steps + 1), np.inf)
        for row, (option, at) in enumerate(zip(group, price, strict=True)):
            if at <= steps:
                table[row, at:] = best[: steps + 1 - at] + option.weight
        taken[number] = table.argmin(0)
        best = table.min(0)
        prices.append(price)
    if not np.isfinite(best[-1]):
        return None
    left = int(np.argmax(best <= best[-1] * (1 + 1e-12) if best[-1] > 0 else best <= best[-1]))
    chosen: list[int] = []
    for number in reversed(range(len(groups))):
        chosen.append(int(taken[number, left]))
        left -= prices[number][chosen[-1]]
    return chosen[::-1]


def _price(cost: float, grid: float, steps: int) -> int:
    """A cost in steps of the grid, rounded up; more than all of them if it is beyond the budget."""
    if cost > grid * steps:
        return steps + 1
    return int(np.ceil(cost / grid - 1e-9)) if cost else 0
