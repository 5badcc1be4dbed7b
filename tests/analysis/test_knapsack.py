"""The knapsack against every choice there is."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.analysis.knapsack import Option, solve
from octavo.errors import OctavoError

COST = st.one_of(st.floats(0, 2), st.just(math.inf))
GROUPS = st.lists(st.lists(st.builds(Option, COST, st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=5)


def brute(groups, budget):
    sums = [(sum(o.weight for o in chosen), sum(o.cost for o in chosen)) for chosen in itertools.product(*groups)]
    return min((s for s in sums if s[1] <= budget), default=None)


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.floats(0, 4))
def test_it_is_as_light_as_the_lightest_of_all_choices(groups, budget):
    taken = solve(groups, budget, steps=2000)
    room = budget * (1 - len(groups) / 2000)  # what rounding costs up may lose
    lightest, surely = brute(groups, budget), brute(groups, room)
    if taken is None:
        assert surely is None
        return
    chosen = [group[at] for group, at in zip(groups, taken, strict=True)]
    weight = sum(o.weight for o in chosen)
    assert sum(o.cost for o in chosen) <= budget * (1 + 1e-9)
    assert weight >= lightest[0] * (1 - 1e-9)
    if surely is not None:
        assert weight <= surely[0] * (1 + 1e-9)


def test_of_equal_weights_the_cheaper_is_taken():
    groups = [[Option(0.5, 1.0), Option(0.9, 1.0)], [Option(0.1, 1.0), Option(0.0, 2.0)]]
    assert solve(groups, 2.0) == [0, 0]


def test_a_budget_of_nothing_takes_what_costs_nothing():
    assert solve([[Option(0.0, 5.0), Option(1e-9, 1.0)]], 0.0) == [0]
    assert solve([[Option(1.0, 1.0)]], 0.5) is None


def test_negative_numbers_are_refused():
    with pytest.raises(OctavoError, match="0 or more"):
        solve([[Option(-1.0, 1.0)]], 1.0)


def test_many_groups_are_quick():
    groups = [[Option(i % 7 * 0.01 * j, 3.0 - j) for j in range(3)] for i in range(300)]
    assert solve(groups, 1.0) is not None
