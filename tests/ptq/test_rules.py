"""Ordered rules: the first that matches decides, and what matches nothing is an error."""

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import OctavoError, Rule
from octavo.core import schemes
from octavo.nn import swap
from octavo.ptq.rules import as_rules, assign, deciding, output_heads, rules_from_json, rules_to_json
from tests.nn import models

INT8, FP8 = schemes.INT8_DYNAMIC, schemes.FP8_DYNAMIC


def decide(model, rules):
    return {layer.name: verdict for layer, verdict in assign(model, swap.layers(model), rules).items()}


def net():
    return nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
            "b": nn.ModuleList([nn.Linear(4, 4), type("Special", (nn.Linear,), {})(4, 4)]),
            "lm_head": nn.Linear(4, 9),
        }
    )


HEAD = "output head, left in float unless a rule gives its exact name"


def test_one_scheme():
    for rules in (INT8, "int8-dynamic", [Rule(INT8)], [Rule("int8-dynamic")], {"*": "INT8_DYNAMIC"}):
        verdict = decide(net(), rules)
        assert verdict.pop("a.1") == "no matrix"
        assert verdict.pop("lm_head") == HEAD
        assert verdict == dict.fromkeys(("a.0", "a.2", "b.0", "b.1"), INT8)


def test_the_first_match_decides():
    verdict = decide(net(), [Rule(FP8, "a.0"), Rule(None, "a.*"), Rule(INT8)])
    assert verdict["a.0"] == FP8
    assert verdict["a.2"] == "rule name='a.*'"
    assert verdict["b.0"] == INT8


def test_a_rule_behind_another_is_an_error():
    with pytest.raises(OctavoError, match=r"never decides: name='a\.\*' comes before it, for a.0"):
        decide(net(), {"a.*": None, "a.0": "fp8-dynamic", "*": "int8-dynamic"})


def test_patterns():
    assert [n for n, v in decide(net(), {"*.0": "int8-dynamic"}).items() if v == INT8] == ["a.0", "b.0"]
    assert [n for n, v in decide(net(), {"b.[!0]": "int8-dynamic"}).items() if v == INT8] == ["b.1"]
    assert [n for n, v in decide(net(), {"?.2": "int8-dynamic"}).items() if v == INT8] == ["a.2"]
    with pytest.raises(OctavoError):
        decide(net(), {"A.0": "int8-dynamic"})


def test_types():
    verdict = decide(net(), [Rule(FP8, type="Special"), Rule(INT8, type="Linear")])
    assert verdict["b.1"] == FP8
    assert verdict["a.0"] == INT8
    assert decide(net(), [Rule(INT8, "b.*", "Linear")])["b.1"] == INT8  # a Special is a Linear
    with pytest.raises(OctavoError, match="type='Conv2d'"):
        decide(net(), [Rule(INT8), Rule(FP8, type="Conv2d")])


def test_the_head_wants_its_exact_name():
    for rules in ({"lm_*": INT8, "*": INT8}, {"*": INT8}, [Rule(INT8, "*head"), Rule(INT8)]):
        assert decide(net(), rules)["lm_head"] == HEAD
    assert decide(net(), {"lm_head": FP8, "*": INT8})["lm_head"] == FP8
    assert decide(net(), {"lm_head": None, "*": INT8})["lm_head"] == "rule name='lm_head'"


@pytest.mark.parametrize("family", ["llama", "tied_llama", "opt", "gpt2", "t5", "qwen2", "mixtral"])
def test_heads_of_transformers(family):
    model = models.FAMILIES[family]()
    found = swap.layers(model)
    assert output_heads(model, found) == {model.get_output_embeddings()}
    assert decide(model, "int8-dynamic")["lm_head"] == HEAD


def test_a_head_by_its_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)
            self.middle = nn.Linear(4, 4)
            self.logits = nn.Linear(4, 9, bias=False)
            self.logits.weight = self.table.weight

    assert decide(Tied(), INT8)["logits"] == HEAD


def test_a_shared_module_is_known_by_all_its_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    assert decide(model, {"b": "fp8-dynamic"})["a"] == FP8


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"a.0": INT8, "b.7": INT8}, r"name='b.7'.*b\."),
        ({"b.7": INT8}, r"name='b.7' matches no layer.*b\.[01]"),
        ({"lm_haed": INT8}, "lm_head"),
        ({"nothing*": None, "*": INT8}, "nothing"),
        ([Rule(INT8), Rule(None, "c")], "name='c'"),
        ({"a.1": INT8, "*": INT8}, r"only layers that cannot be quantized \(a.1: no matrix\)"),
        ({"a.1": INT8}, "no matrix"),
    ],
)
def test_rules_without_a_match(rules, words):
    with pytest.raises(OctavoError, match=words):
        decide(net(), rules)


def test_leaving_alone_what_cannot_be_quantized_is_a_match():
    assert decide(net(), {"a.1": None, "*": INT8})["a.1"] == "no matrix"


def test_nothing_to_quantize():
    model = nn.Sequential(nn.Bilinear(4, 4, 1), nn.LayerNorm(4), nn.Embedding(4, 4))
    with pytest.raises(OctavoError, match="nothing to quantize") as caught:
        decide(model, INT8)
    for reason in ("Bilinear has no 8-bit form: 0", "no matrix: 1", "mbedding"):
        assert reason in str(caught.value)
    with pytest.raises(OctavoError, match="no parameters"):
        decide(nn.Sequential(nn.ReLU()), INT8)
    with pytest.raises(OctavoError, match=r"nothing to quantize: rule name='\*'"):
        decide(nn.Sequential(nn.Linear(2, 2)), {"*": None})
    with pytest.raises(OctavoError, match="output head"):
        decide(nn.ModuleDict({"lm_head": nn.Linear(2, 2)}), INT8)
    model = net()
    ov.quantize_(model, "int8-dynamic")
    with pytest.raises(OctavoError, match="already quantized"):
        decide(nn.Sequential(model["a"]), INT8)


@pytest.mark.parametrize(
    "rules", [[], {}, (), None, 5, [INT8], ["int8-dynamic"], Rule(INT8), [Rule(5)], "int9", {"*": 3}]
)
def test_what_rules_are_not(rules):
    with pytest.raises(OctavoError):
        decide(net(), rules)


def test_rules_are_resolved_once():
    assert as_rules("int8-dynamic") == (Rule(INT8),)
    assert as_rules({"a": "fp8-dynamic", "b": None}) == (Rule(FP8, "a"), Rule(None, "b"))
    assert str(Rule(INT8, "a.*", "Linear")) == "name='a.*', type='Linear'"


def test_a_parametrized_head():
    model = nn.ModuleDict({"x": nn.Linear(4, 4), "lm_head": nn.utils.parametrizations.weight_norm(nn.Linear(4, 9))})
    assert decide(model, INT8)["lm_head"] == HEAD
    assert torch.is_tensor(model["lm_head"].weight)


def test_what_decides():
    first, last = Rule(INT8, "a.*", smooth=0.3), Rule("int8-dynamic", rounding="gptq")
    model = net()
    decided = {layer.name: rule for layer, rule in deciding(model, swap.layers(model), [first, last]).items()}
    assert decided == {"a.0": first, "a.2": first, "b.0": Rule(INT8, rounding="gptq"), "b.1": decided["b.0"]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"smooth": 1.01},
        {"smooth": -0.1},
        {"smooth": float("nan")},
        {"smooth": "seek"},
        {"smooth": True},
        {"smooth": [0.5]},
        {"rounding": "up"},
        {"rounding": None},
    ],
)
def test_what_smoothing_and_rounding_are_not(wrong):
    with pytest.raises(OctavoError, match=f"{next(iter(wrong))} is"):
        Rule(INT8, "x", **wrong)
    with pytest.raises(OctavoError, match=r"rule 1 \(x\)"):
        rules_from_json([{"name": "x", "scheme": "int8-dynamic", **wrong}])


@pytest.mark.parametrize("more", [{"smooth": 0.5}, {"rounding": "gptq"}])
def test_a_layer_left_alone_is_not_smoothed(more):
    with pytest.raises(OctavoError, match="need a scheme"):
        Rule(None, **more)


def test_rules_as_json():
    written = [
        {"name": "*.down_proj", "scheme": "int8-dynamic", "smooth": 0.5},
        {"name": "a.*", "scheme": None, "type": "Linear"},
        {"name": "*", "scheme": "fp8-dynamic", "smooth": "search", "rounding": "gptq"},
    ]
    rules = rules_from_json(written)
    assert rules == [
        Rule(INT8, "*.down_proj", smooth=0.5),
        Rule(None, "a.*", "Linear"),
        Rule(FP8, smooth="search", rounding="gptq"),
    ]
    assert rules_to_json(rules) == written
    assert rules_to_json({"a": INT8, "b": None}) == [
        {"name": "a", "scheme": "int8-dynamic"},
        {"name": "b", "scheme": None},
    ]
    unnamed = [Rule(schemes.dynamic("e4m3fn", weight_group=32)), Rule(schemes.constant("e3m4", 5), "x")]
    assert rules_from_json(rules_to_json(unnamed)) == unnamed


def test_rules_in_a_file(tmp_path):
    file = tmp_path / "rules.json"
    rules = [Rule(INT8, "*.é", smooth=0.25), Rule(schemes.dynamic("e3m4", input_group=16))]
    ov.write_rules(rules, file)
    assert ov.read_rules(file) == rules
    assert file.read_text(encoding="utf-8").startswith(
        '[\n{"name": "*.é", "scheme": "int8-dynamic", "smooth": 0.25},\n'
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"name": "*"}', "rules are a list"),
        ('["int8-dynamic"]', "rule 1 is not an object"),
        ('[{"scheme": "int8-dynamic"}, {"name": "*"}]', "rule 2 is not an object with a scheme"),
        ('[{"scheme": "int8-dynamic", "smoth": 1}]', "rule 1 has 'smoth', which is none of"),
        ('[{"scheme": "int9"}]', r"rule 1 \(\*\): no scheme is called 'int9'"),
        ('[{"scheme": {"type": "Cast"}}]', "rule 1"),
        ('[{"scheme": 5, "name": "a"}]', r"rule 1 \(a\)"),
        ('[{"scheme": "int8-dynamic", "name": null}]', "the name of rule 1 is text"),
        ('[{"scheme": "int8-dynamic", "name": ["a"]}]', "the name of rule 1 is text"),
        ('[{"scheme": "int8-dynamic", "type": 3}]', "the type of rule 1 is text"),
    ],
)
def test_files_that_hold_no_rules(tmp_path, content, words):
    file = tmp_path / "rules.json"
    file.write_text(content)
    with pytest.raises(OctavoError, match=words) as caught:
        ov.read_rules(file)
    assert str(file) in str(caught.value)


def test_no_file_of_rules(tmp_path):
    with pytest.raises(OctavoError, match=r"missing\.json"):
        ov.read_rules(tmp_path / "missing.json")
