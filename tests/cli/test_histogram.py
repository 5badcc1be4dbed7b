"""``octavo inspect --layer``: the numbers of one layer and their range."""

import pytest
import torch
from safetensors import safe_open

from tests.cli.test_calibrate import STATIC, vision, written  # noqa: F401 - a fixture

LAYER = "model.layers.1.mlp.down_proj"
DATA = ("--calibration-text", "novel.txt", "--calibration-windows", 2)


@pytest.fixture(autouse=True)
def novel(place):
    text = "\n\n".join(f"Chapter {i}. It was a dark and stormy night." for i in range(60))
    (place / "novel.txt").write_text(text)


def test_weights(place, octavo):
    with safe_open("llama/model.safetensors", "pt") as file:
        weight = file.get_tensor(f"{LAYER}.weight")
    told = octavo("inspect", "llama", "--layer", LAYER, "--json").json
    assert (told["count"], told["ranges"], told["clipped_share"]) == (weight.numel(), 64, 0)
    assert (told["low"], told["high"]) == (float(weight.min()), float(weight.max()))
    assert sum(told["counts"]) == weight.numel()
    assert told["widest"][1] == pytest.approx(float(weight.abs().max()))
    assert told["narrowest"][1] == pytest.approx(float(weight.abs().amax(1).min()))
    clipped = octavo("inspect", "llama", "--layer", LAYER, "--json", "--calibrate", "percentile=90").json
    assert 0.05 < clipped["clipped_share"] < 0.12
    said = octavo("inspect", "llama", "--layer", LAYER, "--calibrate", "percentile=90", "--scheme", "fp8-static")
    assert "█" in said.out
    assert "percentile=90: 64 ranges, the widest ±" in said.out
    assert "E4M3FN" in said.out
    assert len(said.out.splitlines()) == 33


def test_inputs(place, octavo):
    words = ("inspect", "llama", "--layer", LAYER, "--input", *DATA)
    told = octavo(*words, "--json").json
    assert (told["count"], told["ranges"], told["clipped_share"]) == (2 * 64 * 128, 1, 0)
    assert told["widest"][1] == pytest.approx(max(-told["low"], told["high"]), rel=1e-6)
    for name in ("moving-average=0.1", "percentile=99", "entropy", "mse"):
        other = octavo(*words, "--json", "--calibrate", name).json
        assert (other["counts"], other["range"]) == (told["counts"], name)
    assert 0.008 < octavo(*words, "--json", "--calibrate", "percentile=99").json["clipped_share"] < 0.012
    said = octavo(*words, "--calibrate", "percentile=99")
    assert "over novel.txt, the part not judged by" in said.out
    own = octavo(*words, "--scheme", "int8-dynamic")
    assert "from every input itself: a range for every input, the widest" in own.out


def test_any_layer(place, octavo):
    for name in ("model.norm", "model.embed_tokens", "lm_head"):
        assert octavo("inspect", "llama", "--layer", name).code == 0
    assert octavo("inspect", "llama", "--layer", "model.layers.0.mlp.act_fn", "--input", *DATA).code == 0
    assert octavo("inspect", "gpt2", "--layer", "transformer.h.0.attn.c_attn", "--json").json["ranges"] == 192


def test_8_bit_layers_keep_their_range(place, octavo):
    assert octavo("quantize", "llama", "--out", "small", *STATIC, "--no-evaluate").code == 0
    weights = octavo("inspect", "small", "--layer", LAYER)
    assert "as kept: 64 ranges" in weights.out
    assert "SQNR" not in weights.out
    inputs = octavo("inspect", "small", "--layer", LAYER, "--input", *DATA, "--json").json
    assert (inputs["range"], inputs["ranges"]) == ("as kept", 1)
    said = octavo("inspect", "small", "--layer", LAYER, "--calibrate", "mse")
    assert (said.code, "8-bit already and keeps its range" in said.err) == (2, True)
    other = octavo("inspect", "small", "--layer", LAYER, "--input", *DATA, "--scheme", "fp8-static", "--json").json
    assert other["range"] == "minmax"


def test_of_a_network_of_ones_own(vision, octavo):  # noqa: F811
    words = ("inspect", "vision:net", "--layer", "features.2")
    assert octavo(*words, "--json").json["ranges"] == 8
    told = octavo(*words, "--input", "--data", "vision:stream", "--json").json
    assert (told["count"], told["low"]) == (3 * 4 * 8 * 64, 0)
    affine = octavo(*words, "--input", "--data", "vision:stream", "--scheme", "int8-affine-static", "--json").json
    assert affine["sqnr"] > told["sqnr"] + 4  # twice as fine after a ReLU
    assert octavo("inspect", "vision:net", "--json").json["parameters"] == 80 + 80 + 72 + 36
    said = octavo("inspect", "vision:net", "--layer", "unused", "--input", "--data", "vision:stream")
    assert "layer unused saw no data in 3 batches" in said.err
    said = octavo("inspect", "vision:net", "--layer", "features.0", "--input", "--data", "vision:not_numbers")
    assert "the input of layer features.0 in batch 1" in said.err


def test_pictures(place, octavo):
    pytest.importorskip("matplotlib")
    said = octavo("inspect", "llama", "--layer", LAYER, "--png", "a.png", "--html", "a.html", "--calibrate", "mse")
    assert said.code == 0
    assert (place / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (place / "a.html").read_text()
    assert "<h1>" in page
    assert LAYER in page
    assert "clipped" in page
    assert written(place) == ["a.html", "a.png", "novel.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layer", "model.layers.1.mlp.down_proj.weight"), "has no layer"),
        (("--layer", "down_proj"), "there are, for example, model.layers"),
        (("--layer", ""), "has no layer ''"),
        (("--layer", "model.layers.0.mlp.act_fn"), "has no weight; --input looks at what enters it"),
        (("--layer", "model.embed_tokens", "--input"), "takes torch.int64, not float numbers"),
        (("--layer", LAYER, "--input", "--scheme", "int8-weight-only"), "leaves inputs in float"),
        (
            ("--layer", LAYER, "--input", "--scheme", "int8-dynamic", "--calibrate", "mse"),
            "makes a scale of every input",
        ),
        (("--layer", LAYER, "--data", "vision:pictures"), "--data is for inputs; add --input"),
        (("--layer", LAYER, "--png", "a.jpg"), "--png a.jpg: the name must end in .png"),
        (("--layer", LAYER, "--html", "no/a.html"), "there is no folder no"),
        (("--layer", LAYER, "--tensors"), "Leave one out"),
        (("--layer", LAYER, "--calibrate", "mode"), "no range is called 'mode'; did you mean mse"),
        (("--layer", LAYER, "--scheme", "fp9-static"), "did you mean fp8-static"),
        (("--input",), "--input is for the numbers of one layer"),
        (("--png", "a.png"), "--png is for the numbers of one layer"),
        (("--dtype", "float32"), "--dtype is for the numbers of one layer"),
    ],
)
def test_bad_requests(place, octavo, words, message):
    said = octavo("inspect", "llama", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert written(place) == ["novel.txt"]


def test_not_a_number(place, octavo):
    from safetensors.torch import load_file, save_file

    state = load_file("llama/model.safetensors")
    state[f"{LAYER}.weight"][0, 0] = torch.nan
    save_file(state, "llama/model.safetensors", {"format": "pt"})
    said = octavo("inspect", "llama", "--layer", LAYER)
    assert (said.code, f"the weight of {LAYER}: 1 of" in said.err) == (2, True)
