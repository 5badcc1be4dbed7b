"""`octavo bench` on tiny layers and models."""

import json
import sys

import pytest
import torch

from octavo.analysis.bench import language, linear, peers, race, roofline
from octavo.cli import bench

FAST = ("--repeats", 2, "--peers", "none")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A roofline in no time, and a cache that two layers fill."""
    roof = roofline.Roofline(1e10, {"FP32": 1e11, "BF16": 2e11, "INT8": 4e11})
    monkeypatch.setattr(roofline, "measure", lambda **_: roof)
    monkeypatch.setattr(roofline, "cache_size", lambda: 1 << 12)


def test_layers(octavo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = ("--shapes", "1x17x20,4x17x20,2x64x32", "--schemes", "int8-dynamic,FP8_dynamic")
    said = octavo("bench", *shapes, *FAST, "--plot", "a.png", "--html", "a.html")
    assert said.code == 0, said.err
    for words in ("1 × 17 × 20", "2 × 64 × 32", "torch._int_mm", "fp8-dynamic", "to BF16", "% of roof", "a.png"):
        assert words in said.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "4x17x20" in (tmp_path / "a.html").read_text()
    told = octavo("bench", *shapes, *FAST, "--json").json
    assert told["interrupted"] is False
    assert told["roofline"]["peaks"]["INT8"] == 4e11
    assert len(told["timings"]) == 3 * 5
    by = {(row["task"], row["contender"]): row for row in told["timings"]}
    row = by["4x17x20", "int8-dynamic"]
    assert row["reason"] is None
    assert row["rate_unit"] == "GFLOP/s"
    assert row["rate"] == pytest.approx(2 * 4 * 17 * 20 / 1e9 / row["median"])
    assert len(row["seconds"]) == 2
    assert row["of_roof"] == pytest.approx(max(row["flops"] / 4e11, row["nbytes"] / 1e10) / row["median"])
    base = by["4x17x20", "BF16"]["seconds"]
    ratios = [b / s for b, s in zip(base, row["seconds"], strict=True)]
    assert row["ratio"] == pytest.approx(sum(ratios) / 2)


def test_models(place, octavo):
    said = octavo("bench", "llama", "--schemes", "int8-dynamic", *FAST, "--new", 3, "--prompt", 9, "--threads", 1)
    assert said.code == 0, said.err
    assert "prefill: 9 tokens" in said.out
    assert "decode: 3 tokens after 9" in said.out
    assert "LlamaForCausalLM in float32" in said.out
    told = octavo("bench", "gpt2", "--schemes", "none", *FAST, "--new", 3, "--json").json
    assert {row["contender"] for row in told["timings"]} == {"FP32", "BF16"}
    assert {row["rate_unit"] for row in told["timings"]} == {"tokens/s"}
    assert (told["prompt"], told["new"]) == (512, 3)


MINE = """
import torch
from torch import nn
def bare():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
def model():
    return bare(), batches()
def batches():
    return [torch.randn(3, 8), torch.randn(5, 8)]
def nothing():
    return []
def picky():
    return bare(), [torch.randn(3, 9)]
"""


def test_models_of_ones_own(octavo, tmp_path, monkeypatch):
    (tmp_path / "speedy.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("speedy", None)
    said = octavo("bench", "speedy:model", "--schemes", "int8-dynamic,int8-static", *FAST)
    assert said.code == 0, said.err
    assert "forward" in said.out
    assert "batches/s" in said.out
    assert octavo("bench", "speedy:bare", "--data", "speedy:batches", "--schemes", "int8-dynamic", *FAST).code == 0
    said = octavo("bench", "speedy:bare", *FAST)
    assert said.code == 2
    assert "--data MODULE:FUNCTION" in said.err
    assert "yields no batch" in octavo("bench", "speedy:bare", "--data", "speedy:nothing", *FAST).err
    assert "--prompt is for language models" in octavo("bench", "speedy:model", "--prompt", 3, *FAST).err
    said = octavo("bench", "speedy:picky", "--schemes", "int8-dynamic", *FAST)
    assert said.code == 0  # nothing could run, and the table says why
    assert said.out.count("9") >= 3


def test_a_classifier_wants_a_batch(place, octavo):
    said = octavo("bench", "bert", *FAST)
    assert said.code == 2
    assert "bert (BertForSequenceClassification) is no causal language model; give it a batch" in said.err


def test_a_scheme_that_fails_is_a_row(octavo, monkeypatch):
    monkeypatch.setattr(linear, "_scheme", lambda *_: 1 / 0)
    said = octavo("bench", "--shapes", "2x8x8", "--schemes", "int8-dynamic", *FAST)
    assert said.code == 0
    assert "ZeroDivisionError: division by zero" in said.out
    told = octavo("bench", "--shapes", "2x8x8", "--schemes", "int8-dynamic", *FAST, "--json").json
    assert told["timings"][-1]["reason"] == "ZeroDivisionError: division by zero"
    assert told["timings"][-1]["rate"] is None


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted(octavo, monkeypatch, as_json):
    """Ctrl-C shows what there is, and says that it is not all."""
    takes = []
    take = race._Lane.take

    def stop(self):
        takes.append(self)
        if len(takes) > 7:
            raise KeyboardInterrupt
        take(self)

    monkeypatch.setattr(race._Lane, "take", stop)
    words = ("--json",) if as_json else ()
    said = octavo("bench", "--shapes", "2x8x8", "--schemes", "int8-dynamic", "--repeats", 9, "--peers", "none", *words)
    assert said.code == 130
    assert "interrupted; what was measured until then is shown" in said.err
    if as_json:
        told = json.loads(said.out)
        assert told["interrupted"] is True
        assert [len(row["seconds"]) for row in told["timings"]].count(2) == 3
    else:
        assert "int8-dynamic" in said.out


def test_interrupted_at_once(octavo, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(roofline, "measure", stop)
    said = octavo("bench", *FAST)
    assert (said.code, said.out) == (130, "")
    assert "nothing was written" in said.err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--shapes", "2x8"), "a shape is rows x inner x columns"),
        (("--schemes", "int8-dinamic"), "did you mean int8-dynamic"),
        (("--schemes", ","), "names, with commas between them"),
        (("--peers", "torcha"), "did you mean torchao?"),
        (("--prompt", "3"), "--prompt is for a model; name one"),
        (("--head",), "--head is for a model; name one"),
        (("demo", "--shapes", "1x2x3"), "--shapes are of single layers"),
        (("--plot", "a.html"), "must end in .png"),
        (("--html", "nowhere/a.html"), "there is no folder nowhere"),
        (("--device", "gpu"), "--device gpu cannot be used here"),
        (("--device", "meta", "--peers", "torchao"), "--peers run on the CPU only"),
        (("--repeats", "0"), "whole number of 1 or more"),
        (("nowhere",), "nowhere does not exist"),
    ],
)
def test_bad_words(octavo, words, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = octavo("bench", *words)
    assert (said.code, said.out) == (2, "")
    assert hint in said.err


def test_threads_are_given_back(octavo):
    before = torch.get_num_threads()
    told = octavo("bench", "--shapes", "1x2x2", "--schemes", "none", *FAST, "--threads", before + 1, "--json").json
    assert told["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_peers_that_are_not_here(octavo, monkeypatch):
    monkeypatch.setattr(peers.Peer, "installed", property(lambda self: False))
    few = ("--shapes", "1x2x2", "--schemes", "none", "--repeats", 1)
    said = octavo("bench", *few, "--peers", "torchao,llama.cpp")
    assert "is not installed: pip install torchao" in said.out
    assert "is not installed: pip install llama-cpp-python" in said.out
    said = octavo("bench", *few)
    assert "not installed, so not measured: torchao, bitsandbytes, onnxruntime" in said.out
    assert octavo("bench", *few, "--json").json["not_installed"] == list(peers.FILES)


def test_all(octavo):
    assert bench._schemes(["all"]) == list(__import__("octavo").schemes.NAMES)
    assert bench._schemes(["none"]) == []
    assert set(bench.SCHEMES) <= set(bench._schemes(["all"]))


def test_titles():
    told = {"prompt": 512, "new": 32, "context": 64}
    assert bench._title(language.PREFILL, told) == "prefill: 512 tokens"
    assert bench._title(language.DECODE, told) == "decode: 32 tokens after 64"
    assert bench._title("1x2x3", {}) == "1 × 2 × 3"
    assert bench._title(language.FORWARD, {}) == "forward"
