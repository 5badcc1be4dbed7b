"""Two comparisons of one model make one table."""

import json

import pytest

import octavo as ov
from benchmarks import choosing
from octavo.analysis import compare as comparing
from octavo.analysis.choose import choose
from octavo.analysis.comparison import Candidate, Comparison
from octavo.core import schemes
from octavo.errors import OctavoError
from tests.analysis.planted import Chain, batches


def test_a_search_starts_from_both():
    model, data, other = Chain(large=[1]), batches(), Candidate(schemes.get("llm-int8"))
    first = ov.compare(model, data, ["int8-dynamic"], whole=False)
    second = ov.compare(model, data, ["int8-dynamic", other], whole=False)
    both = choosing.joined(first, second)
    assert [c.name for c in both.candidates] == ["as it is", "int8-dynamic", "llm-int8"]
    assert len(both.cells) == 3 * len(model.layers)
    assert both.seconds == first.seconds
    assert Comparison.from_json(json.loads(json.dumps(both.to_json()))) == both
    choice = choose(model, data, 1e-3, "bytes", candidates=["int8-dynamic", other, None], comparison=both)
    assert choice.met and choice.decisions[1].candidate == "llm-int8"
    with pytest.raises(OctavoError, match="does not know"):
        choose(model, data, 1e-3, "bytes", candidates=["int8-dynamic", other], comparison=first)


def test_every_question_is_about_schemes_that_were_compared():
    known = {*comparing.SCHEMES, *choosing.SMOOTHED, *choosing.SMOOTHED_WEIGHTS, None}
    assert all(set(question.candidates) <= known for question in choosing.QUESTIONS)
    assert all(c.scheme.input is not None for c in comparing.as_candidates(choosing.EVERY)[1:])
