"""`octavo quantize`: what it writes, what it says, and everything it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo as ov
from octavo import schemes
from octavo.cli import main as command
from octavo.cli.schemes import SCHEMES
from octavo.io import checkpoint

INT8 = ("--scheme", "int8-dynamic")
FEW = ("--windows", 3, "--window", 32)


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def written(place):
    return sorted(p.name for p in place.iterdir() if p.name not in ("llama", "gpt2", "bert"))


def test_the_whole_way(place, octavo):
    said = octavo("quantize", "llama", *INT8, "--out", "small", *FEW)
    assert said.code == 0
    assert said.err == ""
    lines = said.out.splitlines()
    assert any(line.startswith("int8-dynamic") and "14 Linear" in line for line in lines)
    assert any("model.layers.*.mlp.down_proj" in line and " dB" in line for line in lines)
    assert any("model.embed_tokens" in line and "embedding" in line for line in lines)
    assert any("output head" in line and "lm_head" in line for line in lines)
    for word in ("size", "perplexity", "weight SQNR", "seconds", "written", "octavo", "transformers", "vLLM"):
        assert any(line.startswith(word) for line in lines), word
    assert "\x1b" not in said.out
    assert not any(line.endswith(" ") for line in lines)
    assert isinstance(ov.load("small"), torch.nn.Module)


def test_json_and_evaluate_agree(place, octavo):
    said = octavo("quantize", "llama", *INT8, "--out", "small", "--json", *FEW)
    told = said.json
    assert (told["layout"], told["out"], told["class"]) == ("compressed-tensors", "small", "LlamaForCausalLM")
    assert told["bytes_after"] < told["bytes_before"]
    assert [*told["seconds"]] == ["load", "evaluate before", "quantize", "evaluate after", "save"]
    assert len([x for x in told["layers"] if x["scheme"] == "int8-dynamic"]) == 14
    assert told["weight_sqnr"]["worst_layer"] in [x["name"] for x in told["layers"]]
    before = octavo("evaluate", "llama", "--json", *FEW).json
    after = octavo("evaluate", "small", "--json", *FEW).json
    assert before["perplexity"] == told["perplexity"]["before"]
    assert after["perplexity"] == told["perplexity"]["after"]
    assert (after["tokens"], after["windows"], after["window"]) == (93, 3, 32)
    assert after["numbers"] == "LlamaForCausalLM with int8-dynamic"


def test_gpt2_goes_into_our_own_layout_and_says_so(place, octavo):
    said = octavo("quantize", "gpt2", *INT8, "--out", "small", *FEW)
    assert said.code == 0
    assert "note: small will be in Octavo's own layout, which only octavo.load opens: transformer.h.0" in said.err
    assert "(octavo)" in said.out
    assert "from_pretrained" not in said.out
    assert "vllm" not in said.out
    assert octavo("evaluate", "small", *FEW).code == 0


def test_bert_has_no_perplexity(place, octavo):
    said = octavo("quantize", "bert", *INT8, "--out", "small")
    assert said.code == 0
    assert "not measured: BertForSequenceClassification is not a causal language model" in said.out
    assert "BertForSequenceClassification.from_pretrained" in said.out
    assert "vllm" not in said.out
    said = octavo("evaluate", "small")
    assert (said.code, said.out) == (2, "")
    assert "is not a causal language model" in said.err


def test_without_tokenizer(place, octavo):
    for file in place.glob("llama/tokenizer*"):
        file.unlink()
    said = octavo("quantize", "llama", *INT8, "--out", "small")
    assert said.code == 0
    assert "not measured: the model comes without a tokenizer" in said.out


def test_no_evaluate(place, octavo):
    told = octavo("quantize", "llama", *INT8, "--out", "small", "--no-evaluate", "--json").json
    assert told["perplexity"] == {"not_measured": "--no-evaluate"}


def test_dtype(place, octavo):
    assert octavo("quantize", "llama", *INT8, "--out", "small", "--dtype", "bfloat16", *FEW).code == 0
    assert json.loads((place / "small/config.json").read_text())["dtype"] == "bfloat16"


def test_text_of_ones_own(place, octavo):
    (place / "novel.txt").write_text("\n\n".join(f"Chapter {i}. It was a dark and stormy night." for i in range(60)))
    said = octavo("quantize", "llama", *INT8, "--out", "small", "--text", "novel.txt", "--windows", 500, "--window", 32)
    assert said.code == 0
    assert "note: the part of novel.txt to judge by holds" in said.err
    assert "of novel.txt" in said.out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "int8-dynamic"),
        (("--scheme", "FP8_DYNAMIC"), "fp8-dynamic"),
        (("--weights", "e4m3fn"), "fp8-dynamic"),
        (("--weights", "e4m3fn", "--inputs", "int8"), schemes.dynamic("E4M3FN", "INT8")),
        (("--weights", "e3m4", "--inputs", "none"), "e3m4-weight-only"),
        (("--scheme", "int8-weight-only", "--weight-group", "32"), schemes.weight_only("INT8", 32)),
        (("--scheme", "int8-weight-only", "--inputs", "int8"), "int8-dynamic"),
        (("--scheme", "int8-group64", "--input-group", "16"), schemes.dynamic("INT8", None, 64, 16)),
        (("--scheme", "int8-group64", "--inputs", "e3m4"), "e3m4-int8-group64"),
        (("--scheme", "e3m4-int8-group64", "--weight-group", "32"), schemes.dynamic("INT8", "E3M4", 32, 64)),
        (("--scheme", "int8-static", "--weights", "e4m3fn"), "fp8-static"),
        (
            ("--scheme", "int8-static", "--inputs", "e3m4", "--weight-group", "32"),
            schemes.static("INT8", "E3M4", weight_group=32),
        ),
        (("--scheme", "int8-static", "--inputs", "none"), "int8-weight-only"),
        (("--scheme", "int8-affine-static", "--weights", "e4m3fn"), schemes.static("E4M3FN", "UINT8", affine=True)),
        (("--scheme", "w8a16", "--inputs", "int8"), "int8-dynamic"),
    ],
)
def test_flags_make_schemes(place, octavo, flags, expected):
    told = octavo("quantize", "llama", *INT8, "--dry-run", "--json", *flags).json
    assert {x["scheme"] for x in told["layers"]} - {None} == {schemes.describe(schemes.get(expected))}
    assert written(place) == []


def test_rules_in_order(place, octavo):
    said = octavo(
        *(
            "quantize",
            "llama",
            *INT8,
            "--dry-run",
            "--json",
            "--rule",
            "lm_head=int8-weight-only",
            "--skip",
            "*.0.mlp.*",
        ),
        *("--rule", "*.mlp.*=fp8-dynamic", "--rule", "*.k_proj=none"),
    )
    schemes = {x["name"]: x["scheme"] for x in said.json["layers"]}
    assert schemes["lm_head"] == "int8-weight-only"
    assert schemes["model.layers.0.mlp.up_proj"] is None
    assert schemes["model.layers.1.mlp.up_proj"] == "fp8-dynamic"
    assert schemes["model.layers.1.self_attn.k_proj"] is None
    assert schemes["model.layers.1.self_attn.q_proj"] == "int8-dynamic"


def test_only_rules(place, octavo):
    said = octavo("quantize", "llama", "--dry-run", "--scheme", "none", "--rule", "*.q_proj=int8-dynamic")
    assert said.code == 0
    assert "no rule matches" in said.out
    assert "Nothing was changed or written. The layout would be compressed-tensors." in said.out


def test_force_replaces(place, octavo):
    assert octavo("quantize", "llama", *INT8, "--out", "small", "--no-evaluate").code == 0
    said = octavo("quantize", "llama", *INT8, "--out", "small", "--no-evaluate")
    assert (said.code, "--force" in said.err) == (2, True)
    again = octavo("quantize", "llama", "--out", "small", "--no-evaluate", "--force", "--scheme", "fp8-dynamic")
    assert again.code == 0
    assert octavo("inspect", "small", "--json").json["schemes"]["model.layers.0.mlp.up_proj"] == "fp8-dynamic"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lama", "--out", "x"), "lama does not exist. Did you mean llama?"),
        (("llama",), "--out DIR is missing"),
        (("llama", "--out", ""), "name of the output folder is empty"),
        (("llama", "--out", "bert"), "bert exists and is not empty"),
        (("llama", "--out", "llama/config.json"), "is a file, not a folder"),
        (("llama", "--out", "llama/config.json/x"), "config.json is a file"),
        (("llama", "--out", "x", "--scheme", "int8-dynamc"), "did you mean int8-dynamic"),
        (("llama", "--out", "x", "--rule", "*=int9"), "no scheme is called 'int9'"),
        (("llama", "--out", "x", "--weights", "e4m3f"), "did you mean e4m3fn"),
        (("llama", "--out", "x", "--inputs", "int88"), "no format is called 'int88'"),
        (("llama", "--out", "x", "--scheme", "fp8-block", "--inputs", "e5m2"), "does not go with --scheme fp8-block"),
        (("llama", "--out", "x", "--inputs", "none", "--input-group", "8"), "--input-group groups inputs"),
        (("llama", "--out", "x", "--scheme", "int8-static", "--input-group", "8"), "a static input has one scale"),
        (("llama", "--out", "x", "--weights", "fp16"), "at most 8 bits"),
        (("llama", "--out", "x", "--weight-group", "0"), "--weight-group: must be a whole number"),
        (("llama", "--out", "x", "--windows", "some"), "--windows: must be a whole number"),
        (("llama", "--out", "x", "--window", "1"), "a window has 2 tokens or more"),
        (("llama", "--out", "x", "--window", "65"), "longer than the 64 tokens"),
        (("llama", "--out", "x", "--rule", "q_proj"), "NAMES=SCHEME"),
        (("llama", "--out", "x", "--rule", "*.qproj=fp8-dynamic"), "the rule name='*.qproj' matches no layer"),
        (("llama", "--out", "x", "--skip", "nothing"), "matches no layer"),
        (("llama", "--out", "x", "--skip", "*"), "nothing to quantize"),
        (("llama", "--out", "x", "--scheme", "none"), "--scheme none leaves every layer alone"),
        (("llama", "--out", "x", "--scheme", "none", "--weights", "int8"), "--weights changes the general scheme"),
        (("llama", "--out", "x", "--text", "nope.txt"), "nope.txt does not exist"),
        (("llama", "--out", "x", "--text", "llama"), "llama is a folder"),
        (("llama", "--out", "x", "--text", "llama/model.safetensors"), "is binary, not text"),
        (("llama", "--out", "x", "--no-evaluate", "--text", "x.txt"), "--no-evaluate"),
        (("llama", "--out", "x", "--layout", "compressed-tensors", "--weights", "e5m2"), "q_proj: the layout has"),
        (("gpt2", "--out", "x", "--layout", "compressed-tensors"), "c_attn: it is a transformers Conv1D"),
        (("llama", "--out", "x", "--weight", "int8"), "did you mean --weights?"),
        (("llama", "--out", "x", "--dtype", "float8"), "invalid choice: 'float8'"),
        ((), "required: MODEL"),
    ],
)
def test_bad_requests(place, octavo, words, message):
    said = octavo("quantize", *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert message in said.err
    assert written(place) == []


def test_short_text(place, octavo):
    (place / "short.txt").write_text("hello world")
    assert "no two different parts" in octavo("quantize", "llama", *INT8, "--out", "x", "--text", "short.txt").err
    (place / "short.txt").write_text("\n\n".join("abcdefgh"))
    said = octavo("quantize", "llama", *INT8, "--out", "x", "--text", "short.txt")
    assert (said.code, "less than one window of 64" in said.err) == (2, True)


def drop(name):
    return lambda place: (place / "llama" / name).unlink()


def cut_off(place):
    file = place / "llama/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(place):
    (place / "llama/model.safetensors").rename(place / "llama/pytorch_model.bin")


def not_a_number(state):
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("config.json"), "llama has no config.json"),
        (drop("model.safetensors"), "llama holds no weights"),
        (cut_off, "is cut off"),
        (pickled, "can run code when opened"),
        (lambda place: (place / "llama/config.json").write_text("{"), "config.json"),
        (lambda place: edit_weights(place / "llama", not_a_number), "model.layers.1.mlp.up_proj"),
    ],
)
def test_bad_folders(place, octavo, damage, message):
    damage(place)
    said = octavo("quantize", "llama", *INT8, "--out", "x", *FEW)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert message in said.err
    assert written(place) == []


def test_not_a_number_without_evaluation(place, octavo):
    edit_weights(place / "llama", not_a_number)
    said = octavo("quantize", "llama", *INT8, "--out", "x", "--no-evaluate")
    assert (said.code, "model.layers.1.mlp.up_proj.weight holds 1 NaN" in said.err) == (2, True)


def test_what_is_8_bit_already(place, octavo):
    """FP8 becomes INT8: the numbers of the first are what the second is measured against."""
    octavo("quantize", "llama", "--scheme", "fp8-dynamic", "--out", "small", "--no-evaluate")
    said = octavo("quantize", "small", "--scheme", "int8-dynamic", "--out", "x", "--no-evaluate")
    assert said.code == 0
    assert "small is 8-bit already (fp8-dynamic)" in said.err
    config = json.loads((place / "x" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    assert "--dtype is for float models" in octavo("evaluate", "small", "--dtype", "float16").err


@pytest.mark.parametrize("where", ["octavo.ptq.quantize.quantize_", "octavo.io.checkpoint.save"])
def test_interrupted(place, octavo, monkeypatch, where):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    said = octavo("quantize", "llama", *INT8, "--out", "x", "--no-evaluate")
    assert (said.code, said.out) == (130, "")
    assert said.err == "error: interrupted; nothing was written\n"
    assert written(place) == []


def test_interrupted_once_it_is_written(place, octavo, monkeypatch):
    from octavo.cli import report

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "done", interrupt)
    said = octavo("quantize", "llama", *INT8, "--out", "x", "--no-evaluate")
    assert (said.code, said.err) == (130, "error: interrupted; x is written\n")
    checkpoint.load("x")


def test_ctrl_c_while_writing(place):
    script = (
        "import sys, time\n"
        "from octavo.io import checkpoint\n"
        "def slow(model, state, folder, file):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "checkpoint._write_tensors = slow\n"
        "from octavo.cli.main import main\n"
        "sys.exit(main(['quantize', 'llama', '--scheme', 'int8-dynamic', '--out', 'x', '--no-evaluate']))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "writing\n"
    run.send_signal(2)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (130, "", "error: interrupted; nothing was written\n")
    assert written(place) == []


def test_the_schemes_of_the_help():
    assert [*SCHEMES] == [*schemes.NAMES]
    assert all(name in command.build().format_help() for name in schemes.NAMES)


def test_no_transformers(place, octavo, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = octavo("quantize", "llama", *INT8, "--out", "x")
    assert (said.code, "pip install 'octavo[cli]'" in said.err) == (2, True)


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may write anywhere")
def test_no_permission(place, octavo):
    (place / "locked").mkdir(mode=0o500)
    assert "no permission" in octavo("quantize", "llama", *INT8, "--out", "locked/x").err
