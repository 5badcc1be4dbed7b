"""Rules that say what became of every layer."""

import random

import pytest

from octavo.analysis.compare import quantizable
from octavo.analysis.comparison import Candidate
from octavo.analysis.rule_writing import family, rules_for
from octavo.core import schemes
from octavo.nn import swap
from octavo.ptq.rules import Rule, deciding
from tests.nn import models

INT8, FP8 = Candidate(schemes.INT8_DYNAMIC), Candidate(schemes.FP8_DYNAMIC)
ALONE = Candidate(None)


def test_a_family_is_the_name_without_its_numbers():
    assert family("model.layers.12.mlp.down_proj") == "model.layers.*.mlp.down_proj"
    assert family("0.conv1.2") == "*.conv1.*"


def test_what_most_layers_get_needs_no_name_and_a_family_has_a_short_one():
    model = models.llama()
    layers = quantizable(model)
    decided = {x.name: FP8 if x.name.endswith("down_proj") else INT8 for x in layers}
    decided["model.layers.1.self_attn.q_proj"] = ALONE
    assert rules_for(model, layers, decided) == [
        Rule(None, "model.layers.1.self_attn.q_proj"),
        Rule(schemes.FP8_DYNAMIC, "*.down_proj"),
        Rule(schemes.INT8_DYNAMIC, "*"),
    ]


@pytest.mark.parametrize("name", models.FAMILIES)
def test_any_mix_comes_back_from_its_rules(name):
    model = models.FAMILIES[name]()
    layers = quantizable(model)
    dice = random.Random(name)
    for _ in range(5):
        choices = [INT8, FP8, ALONE, Candidate(schemes.INT8_DYNAMIC, rounding="gptq")][: dice.randint(2, 4)]
        decided = {x.name: dice.choice(choices) for x in layers}
        decided[layers[0].name] = INT8
        got = {
            x.name: rule for x, rule in deciding(model, swap.layers(model), rules_for(model, layers, decided)).items()
        }
        for layer, candidate in decided.items():
            rule = got.get(layer)
            assert (None if rule is None else (rule.scheme, rule.rounding)) == (
                None if candidate.scheme is None else (candidate.scheme, candidate.rounding)
            )


def test_a_pattern_that_means_too_much_is_not_used():
    model = models.bert()
    layers = quantizable(model)
    decided = {x.name: FP8 if x.name.endswith("output.dense") and "attention" not in x.name else INT8 for x in layers}
    rules = rules_for(model, layers, decided)  # bert.encoder.layer.*.output.dense means attention.output.dense too
    got = {x.name: rule.scheme for x, rule in deciding(model, swap.layers(model), rules).items()}
    assert got == {name: candidate.scheme for name, candidate in decided.items()}
