"""``octavo compare``, and ``octavo quantize`` that chooses."""

import json

import pytest

import octavo as ov
from octavo.analysis.comparison import Comparison

SEEN = ("--windows", 2, "--window", 32, "--calibration-windows", 4)
TWO = ("--schemes", "int8-dynamic,fp8-dynamic")


def test_compare_says_what_each_scheme_costs(place, octavo):
    said = octavo(
        "compare", "llama", *TWO, "--fast", "--calibration-windows", 4, "--save", "all.json", "--html", "a.html"
    )
    assert (said.code, said.err) == (0, "")
    assert "whole model" in said.out and "one layer alone" in said.out and "fp8-dynamic" in said.out
    found = Comparison.from_json(json.loads((place / "all.json").read_text()))
    assert [candidate.name for candidate in found.candidates] == ["as it is", "int8-dynamic", "fp8-dynamic"]
    assert len(found.layers) == 14 and len(found.outcomes) == 3
    whole = (place / "a.html").read_text()
    for section in ("trade-off", "layers", "numbers", "outliers", "made", "words"):
        assert f'<h2 id="{section}">' in whole
    told = octavo("compare", "llama", *TWO, "--fast", "--calibration-windows", 4, "--no-whole", "--json").json
    assert len(told["comparison"]["cells"]) == 42 and told["comparison"]["outcomes"] == []


def test_quantize_without_a_scheme_chooses(place, octavo):
    said = octavo("quantize", "llama", "--out", "small", "--fast", "--budget", "5%", "--objective", "size", *SEEN)
    assert said.code == 0
    assert "within the budget of 5 %" in said.out and "14 of 14 layers" in said.out
    rules = ov.read_rules("small/rules.json")
    assert all(rule.scheme is not None for rule in rules)
    again = octavo("quantize", "llama", "--rules", "small/rules.json", "--out", "again", "--no-evaluate")
    assert again.code == 0
    both = [octavo("inspect", name, "--json").json["schemes"] for name in ("small", "again")]
    assert both[0] == both[1]


def test_models_without_perplexity_are_judged_by_their_outputs(place, octavo):
    said = octavo("quantize", "bert", "--out", "small", "--budget", "0.01", "--objective", "size", "--fast")
    assert said.code == 0
    assert "noise in the outputs is" in said.out


def test_for_vllm_it_writes_what_vllm_reads_with_several_groups(place, octavo):
    flags = ("--for", "vllm", "--budget", "1%", "--objective", "size", "--no-evaluate", "--json")
    told = octavo("quantize", "llama", "--scheme", "auto", "--out", "small", *flags, "--html", "why.html").json
    assert told["layout"] == "compressed-tensors"
    assert told["choice"]["met"] and told["choice"]["engine"] == "vllm"
    assert (place / "why.html").stat().st_size > 1000
    groups = json.loads((place / "small/config.json").read_text())["quantization_config"]["config_groups"]
    kinds = {layer["scheme"] for layer in told["layers"] if layer["scheme"]}
    assert len(groups) == len(kinds)


NETWORK = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))

def with_data(shape=(8, 64)):
    return net(), [torch.randn(shape) for _ in range(4)]

def broken():
    model, batches = with_data()
    model[0].weight.data[0, 0] = float("nan")
    return model, batches

def narrow():
    return with_data((8, 63))

def empty():
    return with_data((0, 64))

def score(model):
    return 0.5
"""


def test_where_nothing_is_faster_the_smallest_is_chosen(place, octavo, monkeypatch):
    """Without an objective, that is; who asks for the fastest is told that there is nothing."""
    from octavo.analysis import variants

    def slower(made, x):
        return {name: variants.Timing(1.0 + (name != "as it is"), 0.0) for name in made}

    monkeypatch.setattr(variants, "timings", slower)
    (place / "slow.py").write_text(NETWORK)
    said = octavo("quantize", "slow:with_data", "--out", "small", "--budget", "0.1", "--evaluate", "slow:score")
    assert said.code == 0
    assert "note: nothing runs faster here than the model as it is, so this is the smallest" in said.err
    assert "2 of 2 layers in 8 bits" in said.out and "slower here" in said.out
    assert "model=slow.with_data()[0]" in said.out
    asked = octavo("quantize", "slow:with_data", "--out", "other", "--budget", "0.1", "--objective", "time")
    assert asked.code == 2 and "or use --objective size" in asked.err


def test_the_page_of_a_choice_tells_what_was_measured_on_other_text(place, octavo):
    flags = ("--budget", "5%", "--objective", "size", "--fast", "--html", "why.html", *SEEN)
    said = octavo("quantize", "llama", "--out", "small", *flags)
    assert said.code == 0
    whole = (place / "why.html").read_text()
    assert "Perplexity on text it has not seen" in whole and '<h2 id="numbers">' in whole
    assert "page         why.html" in said.out
    dry = octavo("quantize", "llama", "--dry-run", *flags[:5], "--html", "dry.html")
    assert "Nothing was changed; only dry.html is written." in dry.out
    assert "Perplexity on text" not in (place / "dry.html").read_text()


def test_a_budget_of_nothing_leaves_the_page_that_says_why(place, octavo):
    flags = ("--budget", "0", "--fast", "--objective", "size", "--html", "why.html")
    assert octavo("quantize", "llama", "--out", "small", *flags, *SEEN).code == 2
    assert "keeps the budget; the best has" in (place / "why.html").read_text()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "the output of the model as it is holds NaN or Inf"),
        ("narrow", "the first batch of odd:narrow does not go through the model: RuntimeError: mat1 and mat2"),
        ("empty", "a batch is empty"),
        ("net", "name the data"),
    ],
)
def test_data_that_cannot_be_compared_on(place, octavo, function, message):
    (place / "odd.py").write_text(NETWORK)
    for words in (("compare", f"odd:{function}"), ("quantize", f"odd:{function}", "--out", "small")):
        said = octavo(*words)
        assert said.code == 2 and message in said.err


def test_for_engines_whose_files_octavo_does_not_write_it_says_so(place, octavo):
    said = octavo("quantize", "llama", "--out", "small", "--fast", "--for", "llama.cpp", "--no-evaluate")
    assert said.code == 0
    assert "Octavo writes no file for llama.cpp" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llama", "--budget", "0%", "--fast", "--objective", "size", *SEEN), "keeps the budget; the best has"),
        (("llama", "--budget", "little"), "--budget is a number or a percentage"),
        (("llama", "--scheme", "int8-dynamic", "--budget", "1%"), "--budget is for --scheme auto"),
        (("llama", "--scheme", "auto", "--skip", "*.0.*"), "without --rule"),
        (("llama", "--for", "vllm", "--hardware", "abacus"), "no hardware is called 'abacus'"),
        (("gpt2", "--layout", "compressed-tensors"), "c_attn: it is a transformers Conv1D"),
    ],
)
def test_refusals_say_what_to_do(place, octavo, words, message):
    said = octavo("quantize", *words, "--out", "x")
    assert said.code == 2
    assert message in said.err
    assert not (place / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llama", "--schemes", "int9"), "no scheme is called 'int9'"),
        (("llama", "--schemes", " , "), "--schemes names none"),
        (("llama", "--html", "nowhere/a.html"), "there is no folder nowhere"),
        (("llama", "--html", "a", "--save", "a"), "--html and --save both name a"),
    ],
)
def test_compare_refuses(place, octavo, words, message):
    said = octavo("compare", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
