"""`octavo quantize --stream`: what it writes and says, and what it leaves when it is stopped."""

import os
import signal

import pytest

import octavo as ov
from octavo.io import safe_files
from octavo.io.folder import unfinished


def written(place):
    return sorted(p.name for p in place.iterdir() if p.name not in ("llama", "gpt2", "bert"))


def test_the_whole_way(place, octavo):
    said = octavo("quantize", "llama", "--stream", "--out", "small")
    assert said.code == 0
    assert said.err == ""
    lines = said.out.splitlines()
    assert any(line.startswith("int8-dynamic") and "14 Linear" in line for line in lines)
    assert any("output head" in line and "lm_head" in line for line in lines)
    for word in ("size", "speed", "memory", "written", "octavo", "transformers", "vLLM"):
        assert any(line.startswith(word) for line in lines), word
    assert "resumed" not in said.out
    assert "SQNR" not in said.out
    assert octavo("evaluate", "small", "--windows", 3, "--window", 32).code == 0
    assert written(place) == ["small"]


def test_the_same_files_as_without(place, octavo):
    assert octavo("quantize", "llama", "--out", "whole", "--no-evaluate", "--rule", "lm_head=fp8-dynamic").code == 0
    assert octavo("quantize", "llama", "--out", "small", "--stream", "--rule", "lm_head=fp8-dynamic").code == 0
    for file in place.joinpath("whole").iterdir():
        if file.suffix != ".safetensors":
            assert (place / "small" / file.name).read_bytes() == file.read_bytes()
    one, other = (dict(safe_files.read(name)) for name in ("whole", "small"))
    assert {n: t.tolist() for n, t in one.items()} == {n: t.tolist() for n, t in other.items()}


def test_json(place, octavo):
    told = octavo("quantize", "llama", "--stream", "--out", "small", "--json").json
    assert (told["layout"], told["class"], told["bytes_resumed"]) == ("compressed-tensors", "LlamaForCausalLM", 0)
    assert told["bytes_before"] == sum(x.nbytes for x in safe_files.tensors("llama").values())
    assert told["bytes_after"] == sum(x.nbytes for x in safe_files.tensors("small").values())
    assert told["files"] == ["model.safetensors"]
    assert told["peak_memory_bytes"] > 1e6
    assert told["megabytes_per_second"] > 0
    assert [*told["seconds"]] == ["plan", "stream"]
    assert len([x for x in told["layers"] if x["scheme"] == "int8-dynamic"]) == 14


def test_our_own_layout_is_told(place, octavo):
    said = octavo("quantize", "gpt2", "--stream", "--out", "small")
    assert said.code == 0
    assert "note: small will be in Octavo's own layout, which only octavo.load opens: transformer.h.0" in said.err
    assert ov.load("small") is not None


def test_dry_run(place, octavo):
    said = octavo("quantize", "llama", "--stream", "--dry-run", "--scheme", "fp8-dynamic")
    assert said.code == 0
    assert "Nothing was changed or written. The layout would be compressed-tensors." in said.out
    assert octavo("quantize", "llama", "--dry-run", "--scheme", "fp8-dynamic").out == said.out
    assert written(place) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_gone_on_with(place, octavo, monkeypatch, stop):
    real, writes = os.pwrite, iter(range(1000))

    def pwrite(descriptor, data, offset):
        if next(writes) == 20:
            signal.raise_signal(stop)
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        said = octavo("quantize", "llama", "--stream", "--out", "small")
    assert said.code == 128 + stop
    assert f"what is written is kept in {unfinished('small')}: run the same again to go on, or remove it" in said.err
    assert written(place) == [unfinished("small").name]
    said = octavo("quantize", "llama", "--stream", "--out", "small", "--scheme", "fp8-dynamic")
    assert (said.code, said.out) == (2, "")
    assert "holds an unfinished run with another set of rules" in said.err
    said = octavo("quantize", "llama", "--stream", "--out", "small")
    assert said.code == 0
    assert "resumed" in said.out
    assert written(place) == ["small"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--text", "a.txt"), "--text has the model run, and --stream never builds it"),
        (("--calibrate", "minmax"), "--calibrate has the model run"),
        (("--evaluate", "vision:accuracy"), "--evaluate has the model run"),
        (("--scheme", "int8-static"), "int8-static needs calibration"),
        (("--skip", "*.nothing"), "matches no layer"),
        (("--layout", "compressed-tensors", "--scheme", "e3m4-dynamic"), "compressed-tensors cannot hold this model"),
    ],
)
def test_refused(place, octavo, words, match):
    said = octavo("quantize", "llama", "--stream", "--out", "small", *words)
    assert (said.code, said.out) == (2, "")
    assert match in said.err
    assert written(place) == []


def test_other_models_are_refused(place, octavo):
    for model, match in [("demo", "only safetensors can be streamed"), ("vision:net", "is a Python function")]:
        said = octavo("quantize", model, "--stream", "--out", "small")
        assert (said.code, said.out) == (2, "")
        assert match in said.err
    assert octavo("quantize", "llama", "--stream", "--out", "llama").code == 2
