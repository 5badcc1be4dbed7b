"""A mix keeps its budget, is as light as it can be, and comes back from its rules."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import octavo as ov
from octavo.analysis.choice import Choice
from octavo.analysis.choose import choose
from octavo.analysis.compare import compare
from octavo.analysis.comparison import Candidate
from octavo.core import schemes
from octavo.errors import OctavoError
from octavo.ptq.rules import rules_from_json, rules_to_json
from tests.analysis.planted import Chain, batches
from tests.nn import models

INT8 = ["int8-dynamic", None]


def noise(model, rules, data):
    twin = copy.deepcopy(model)
    ov.quantize_(twin, rules, data)
    with torch.no_grad():
        return sum(float((twin(x) - model(x)).square().sum() / model(x).square().sum()) for x in data) / len(data)


@pytest.mark.parametrize("sensitive", [0, 2, 4])
def test_the_sensitive_layer_stays_as_it_is(sensitive):
    model = Chain(large=[sensitive])
    choice = choose(model, batches(), 1e-3, "bytes", candidates=INT8)
    assert choice.met
    left = [decision.layer for decision in choice.decisions if decision.candidate == "as it is"]
    assert left == [f"layers.{sensitive}"]
    assert noise(model, choice.rules, batches()) == pytest.approx(choice.increase, rel=1e-6)
    assert choice.increase <= 1e-3
    assert "would cost" in choice.decisions[sensitive].reason


def test_or_gets_what_takes_outliers_out():
    choice = choose(Chain(large=[1]), batches(), 1e-3, "bytes", candidates=["int8-dynamic", "llm-int8", None])
    assert choice.met and choice.decisions[1].candidate == "llm-int8"
    assert all(decision.candidate != "as it is" for decision in choice.decisions)


def test_rules_are_json_that_quantizes_the_same():
    model = Chain(large=[2])
    choice = choose(model, batches(), 1e-3, "bytes", candidates=INT8)
    document = json.loads(json.dumps(choice.to_json()))
    assert Choice.from_json(document) == choice
    again = rules_from_json(json.loads(json.dumps(rules_to_json(choice.rules))))
    assert tuple(again) == choice.rules
    summary = ov.quantize_(model, again)
    assert {x.name: x.scheme for x in summary.layers} == {
        d.layer: None if d.candidate == "as it is" else d.candidate for d in choice.decisions
    }
    assert sum(x.bytes_after for x in summary.layers) == choice.bytes_after


def test_a_wider_budget_is_never_heavier():
    model = Chain(large=[1, 3])
    found = compare(model, batches(), ["int8-dynamic", "fp8-dynamic", "int8-group64"], whole=False)
    sizes = []
    for budget in (1e-4, 1e-3, 1e-1, 10.0):
        wanted = ["int8-dynamic", "fp8-dynamic", "int8-group64", None]
        choice = choose(model, batches(), budget, "bytes", candidates=wanted, comparison=found)
        assert not choice.met or choice.increase <= budget
        sizes.append(choice.bytes_after if choice.met else choice.bytes_before)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_a_budget_that_cannot_be_met_says_the_best_and_what_costs_most():
    choice = choose(Chain(large=[2]), batches(), 1e-6, "bytes", candidates=["int8-dynamic", "fp8-dynamic"])
    assert not choice.met
    assert choice.increase > choice.budget
    assert "keeps the budget; the best has" in choice.verdict and choice.costliest[0] == "layers.2"
    assert {d.candidate for d in choice.decisions} <= {"int8-dynamic", "fp8-dynamic"}
    assert len(choice.steps) >= 1 and not any(step.within for step in choice.steps)


def test_a_model_that_nothing_makes_lighter_stays_as_it_is():
    choice = choose(Chain(), batches(), 1.0, "bytes", candidates=[schemes.dynamic("int8", weight_group=1), None])
    assert choice.met and all(d.candidate == "as it is" for d in choice.decisions)
    assert "stays as it is" in choice.verdict


def test_weights_rounded_by_data_are_judged_by_other_data():
    torch.manual_seed(3)
    data, calibration = batches(), [torch.randn(256, 64)]
    assert all("gptq" not in s.what for s in choose(Chain(), data, 1e-2, "bytes", candidates=INT8).steps)
    choice = choose(Chain(), data, 1e-2, "bytes", candidates=["fp8-dynamic", None], calibration=calibration)
    nearest, rounded = choice.steps[:2]
    assert "gptq" in rounded.what and "gptq" not in nearest.what
    helps = rounded.divergence < nearest.divergence
    assert all(("gptq" in step.what) == helps for step in choice.steps[2:])
    assert all(rule.rounding == ("gptq" if helps else "nearest") for rule in choice.rules if rule.scheme)


def test_where_weights_cannot_be_rounded_by_data_they_are_rounded_to_the_nearest():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
    data, calibration = [torch.randn(2, 3, 8, 8)], [torch.randn(2, 3, 8, 8)]
    choice = choose(model, data, 1e-2, "bytes", candidates=["int8-dynamic"], calibration=calibration)
    assert choice.met and {rule.rounding for rule in choice.rules} == {"nearest"}
    assert any("rounded to the nearest" in note for note in choice.notes)


@torch.no_grad()
def test_layers_that_are_smoothed_together_may_differ_in_format():
    torch.manual_seed(0)
    model = models.llama()
    for parameter in model.parameters():
        parameter.mul_(4)
    smooth = Candidate(schemes.get("int8-dynamic"), smooth=0.5)
    data = [{"input_ids": torch.randint(3, models.VOCABULARY, (2, 12))} for _ in range(2)]
    found = compare(model, data, [smooth, "int8-dynamic"], whole=False)
    cells = [
        replace(cell, divergence=0.0 if cell.candidate == "as it is" else 1e9 if "v_proj" in cell.layer else 1e-9)
        if cell.excluded is None
        else cell
        for cell in found.cells
    ]
    choice = choose(
        model, data, 0.5, "bytes", candidates=[smooth, "int8-dynamic", None], comparison=replace(found, cells=cells)
    )
    became = {d.layer: d.candidate for d in choice.decisions}
    for number in range(2):
        attention = f"model.layers.{number}.self_attn."
        assert became[attention + "v_proj"] == "as it is"
        assert became[attention + "q_proj"] == became[attention + "k_proj"] != "as it is"


def test_times_within_their_spread_are_equal_and_bytes_decide():
    model = Chain()
    found = compare(model, batches(), ["int8-dynamic"], whole=False)

    def timed(seconds, spread):
        cells = [
            replace(cell, seconds=1.0 if cell.candidate == "as it is" else seconds, spread=spread)
            for cell in found.cells
        ]
        choice = choose(model, batches(), 1.0, "time", candidates=INT8, comparison=replace(found, cells=cells))
        return {decision.candidate for decision in choice.decisions}

    assert timed(1.04, 0.05) == {"int8-dynamic"}  # slower by less than the runs differ, and smaller
    assert timed(1.06, 0.05) == {"as it is"}
    assert timed(0.5, 0.0) == {"int8-dynamic"}


def test_a_mix_is_timed_in_turns_with_the_model():
    choice = choose(Chain(), batches(), 1.0, "bytes", candidates=["int8-dynamic"])
    assert choice.pace_before > 0 and choice.pace_after > 0
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_language_models_by_the_next_token():
    torch.manual_seed(0)
    model = models.llama()
    data = [{"input_ids": torch.randint(3, models.VOCABULARY, (2, 12))} for _ in range(3)]
    choice = choose(model, data, 0.01, "bytes", candidates=INT8, cells_on=2)
    assert choice.met and "perplexity changes by" in choice.verdict
    assert choice.error > 0 and choice.divergence is not None


def test_vllm_runs_stacked_layers_under_one_scheme():
    torch.manual_seed(0)
    model = models.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.model.layers[0].self_attn.k_proj.weight[0] *= 50
    data = [{"input_ids": torch.randint(3, models.VOCABULARY, (2, 12))} for _ in range(2)]
    choice = choose(model, data, 0.02, "bytes", "vllm", rounding=False)
    became = {d.layer: d.candidate for d in choice.decisions}
    for number in range(2):
        attention = f"model.layers.{number}.self_attn."
        assert len({became[attention + name] for name in ("q_proj", "k_proj", "v_proj")}) == 1
    assert choice.seconds_after is None and choice.engine == "vllm"


def test_wrong_questions_say_what_is_wrong():
    with pytest.raises(OctavoError, match="0 or more"):
        choose(Chain(), batches(), -1)
    with pytest.raises(OctavoError, match="no engine is called 'tpu'"):
        choose(Chain(), batches(), engine="tpu")
    with pytest.raises(OctavoError, match="runs none of the candidates"):
        choose(Chain(), batches(), engine="llama.cpp", candidates=["int8-dynamic"])
    with pytest.raises(OctavoError, match="no data"):
        choose(Chain(), [])
    found = compare(Chain(), batches(), ["int8-dynamic"], whole=False)
    with pytest.raises(OctavoError, match="another one"):
        choose(Chain(), batches(), candidates=["fp8-dynamic"], comparison=found)
    assert Candidate(None).name == "as it is"


def test_a_mix_that_is_lighter_than_what_may_be_spent_is_followed_by_a_cheaper_one():
    """The sum foretells far too little, so that the first mix leaves most of it unspent and still loses too much."""
    model, wanted = Chain(large=[2]), ["int8-dynamic", "int8-group64", None]
    found = compare(model, batches(), wanted[:2], whole=False)
    cells = [
        cell if cell.divergence is None else replace(cell, divergence=cell.divergence / 1e4) for cell in found.cells
    ]
    choice = choose(model, batches(), 1e-3, "bytes", candidates=wanted, comparison=replace(found, cells=cells))
    assert choice.met and choice.increase <= 1e-3
    assert sum(step.within for step in choice.steps) >= 1
