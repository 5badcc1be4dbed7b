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
    assert (place / "a.html").read_text().startswith("<!doctype html>") or "<html" in (place / "a.html").read_text()
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
    assert "the loss changes by" in said.out


def test_for_vllm_it_writes_what_vllm_reads_with_several_groups(place, octavo):
    flags = ("--for", "vllm", "--budget", "1%", "--objective", "size", "--no-evaluate", "--json")
    told = octavo("quantize", "llama", "--scheme", "auto", "--out", "small", *flags, "--html", "why.html").json
    assert told["layout"] == "compressed-tensors"
    assert told["choice"]["met"] and told["choice"]["engine"] == "vllm"
    assert (place / "why.html").stat().st_size > 1000
    groups = json.loads((place / "small/config.json").read_text())["quantization_config"]["config_groups"]
    kinds = {layer["scheme"] for layer in told["layers"] if layer["scheme"]}
    assert len(groups) == len(kinds)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llama", "--budget", "0%", "--fast", "--objective", "size", *SEEN), "No mix keeps the budget"),
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
        (("llama", "--html", "nowhere/a.html"), "there is no folder nowhere"),
    ],
)
def test_compare_refuses(place, octavo, words, message):
    said = octavo("compare", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
