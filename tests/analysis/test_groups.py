"""Groups and what may become of them, against every combination there is."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.analysis.comparison import Candidate
from octavo.analysis.groups import MOST, joined, ways
from octavo.analysis.knapsack import Option
from octavo.core import schemes

INT8, FP8 = schemes.get("int8-dynamic"), schemes.get("fp8-dynamic")
CANDIDATES = [Candidate(None), *(Candidate(scheme, alpha) for scheme in (INT8, FP8) for alpha in (None, 0.5, 0.7))]
NUMBERS = st.integers(0, 6).map(float)
OFFER = st.dictionaries(st.sampled_from(CANDIDATES), st.builds(Option, NUMBERS, NUMBERS), max_size=5)


def allowed(chosen):
    return len({candidate.smooth for candidate in chosen if candidate.scheme is not None}) <= 1


@settings(max_examples=200, deadline=None)
@given(st.lists(OFFER, min_size=1, max_size=3))
def test_what_is_kept_is_what_no_other_combination_beats(offers):
    units = [(str(number),) for number in range(len(offers))]
    found = ways(units, lambda unit: list(offers[int(unit[0])].items()))
    every = [
        (sum(offer[c].cost for offer, c in zip(offers, chosen, strict=True)),
         sum(offer[c].weight for offer, c in zip(offers, chosen, strict=True)))
        for chosen in itertools.product(*offers)
        if allowed(chosen)
    ]  # fmt: skip
    best = sorted({p for p in every if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in every)})
    assert [(way.option.cost, way.option.weight) for way in found] == best
    for way in found:
        assert allowed(way.candidates)
        assert way.option.cost == sum(offer[c].cost for offer, c in zip(offers, way.candidates, strict=True))


def test_very_many_readers_of_one_result_are_still_few_ways():
    offer = [(Candidate(None), Option(0.0, 1.0)), (Candidate(INT8, 0.5), Option(1.0, 0.0))]
    units = [(f"experts.{number}",) for number in range(3 * MOST)]
    scaled = {unit: [(c, Option(o.cost * (1 + 0.1 * number), o.weight)) for c, o in offer]
              for number, unit in enumerate(units)}  # fmt: skip
    found = ways(units, lambda unit: scaled[unit])
    assert len(found) == MOST
    assert set(found[0].candidates) == {Candidate(None)} and set(found[-1].candidates) == {Candidate(INT8, 0.5)}


def test_overlapping_sets_are_one_in_the_order_of_the_names():
    assert joined("abcdef", ["fd", "xb", "ad"]) == [("a", "d", "f"), ("b",), ("c",), ("e",)]
    assert joined([], [["a"]]) == []
