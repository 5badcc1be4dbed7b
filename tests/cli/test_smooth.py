"""`octavo quantize --smooth` and `--rules`."""

import json

import pytest

import octavo as ov


def test_smoothing(place, octavo):
    said = octavo("quantize", "llama", "--out", "small", "--smooth", "0.6", "--calibration-windows", 2, "--windows", 2)
    assert said.code == 0
    assert "6 pairs are smoothed (model.layers.0.input_layernorm → " in said.out
    assert "2 layers could not be smoothed (model.layers.0.self_attn.o_proj: its input comes from" in said.out
    assert ov.load("small").model.layers[0].input_layernorm.weight.std() > 0  # 1 everywhere before


def test_search_and_static(place, octavo):
    flags = ("--scheme", "int8-static", "--smooth", "search", "--calibration-windows", 2, "--no-evaluate")
    said = octavo("quantize", "llama", "--out", "small", *flags)
    assert said.code == 0 and "6 pairs are smoothed" in said.out and "minmax" in said.out


def test_rules_from_a_file(place, octavo):
    rules = [
        {"name": "*.down_proj", "scheme": "fp8-dynamic", "smooth": 0.5},
        {"name": "*.o_proj", "scheme": None},
        {"name": "*", "scheme": "int8-dynamic"},
    ]
    (place / "rules.json").write_text(json.dumps(rules))
    said = octavo("quantize", "llama", "--out", "small", "--rules", "rules.json", "--no-evaluate", "--json")
    assert said.code == 0
    schemes = {layer["name"]: layer["scheme"] for layer in json.loads(said.out)["layers"]}
    assert schemes["model.layers.0.mlp.down_proj"] == "fp8-dynamic"
    assert schemes["model.layers.1.self_attn.o_proj"] is None
    assert schemes["model.layers.1.self_attn.q_proj"] == "int8-dynamic"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--smooth", "2"), "from 0 to 1, or 'search', not '2'"),
        (("--smooth", "nan"), "from 0 to 1"),
        (("--smooth", "0", "--stream"), "smooths or rounds by data"),
        (("--smooth", "0.5", "--stream"), "--stream never builds it"),
        (("--rules", "none.json"), "none.json"),
        (("--rules", "rules.json", "--smooth", "0.5"), "--smooth and --rules"),
        (("--rules", "rules.json", "--skip", "*.0.*"), "--rule and --rules"),
        (("--rules", "rules.json", "--weights", "e4m3fn"), "--weights and --rules"),
        (("--rules", "rules.json", "--stream"), "smooths or rounds by data"),
        (("--smooth", "0.5", "--save-calibration", "x"), "--save-calibration keeps ranges"),
        (("--smooth", "0.5", "--calibrate", "minmax"), "--calibrate is for static scales"),
    ],
)
def test_bad_requests(place, octavo, flags, words):
    (place / "rules.json").write_text('[{"scheme": "int8-dynamic", "smooth": 0.5}]')
    said = octavo("quantize", "llama", "--out", "small", *flags)
    assert said.code != 0 and words in said.err
