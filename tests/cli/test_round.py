"""``octavo quantize --round gptq``: said, done, and refused where it cannot be."""

import pytest

FEW = ("--windows", 3, "--window", 32, "--calibration-windows", 6)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_whole_way(place, octavo, model):
    said = octavo("quantize", model, "--out", "small", "--round", "gptq", *FEW)
    assert said.code == 0
    assert "int8-dynamic, rounded by GPTQ" in " ".join(said.out.split())
    told = octavo("quantize", model, "--out", "small", "--force", "--round", "gptq", *FEW, "--json").json
    assert {x["rounding"] for x in told["layers"] if x["scheme"]} == {"gptq"}
    assert octavo("evaluate", "small", *FEW[:4], "--json").json["perplexity"] == told["perplexity"]["after"]


def test_static_scales_too(place, octavo):
    told = octavo("quantize", "llama", "--out", "small", "--scheme", "int8-static", "--round", "gptq", *FEW, "--json")
    assert {x["rounding"] for x in told.json["layers"] if x["scheme"]} == {"gptq"}


@pytest.mark.parametrize(
    "words",
    [
        ("--stream",),
        ("--scheme", "int8-static", "--save-calibration", "seen"),
        ("--rules", "rules.json"),
    ],
)
def test_refused(place, octavo, words):
    (place / "rules.json").write_text('[{"scheme": "int8-dynamic"}]')
    said = octavo("quantize", "llama", "--out", "small", "--round", "gptq", *words)
    assert said.code != 0 and not (place / "small").exists() and not (place / "seen").exists()
    assert "round" in said.err
