"""Other libraries beside ours: that they are named, that they run where they are, and that they run the same model."""

import numpy
import pytest
import torch

import octavo as ov
from octavo.analysis.bench import language, linear, peers, roofline
from octavo.analysis.bench.peers import Setting, llama_cpp
from octavo.analysis.bench.race import Race
from octavo.io import gguf
from tests.nn import models

HERE = [name for name in peers.FILES if peers.get(name).installed]


def test_names():
    assert [peers.get(name).name for name in peers.FILES] == list(peers.FILES)
    assert peers.get(" TorchAO ").module == "torchao"
    with pytest.raises(ov.OctavoError, match=r"no peer is called 'lama.cpp'; did you mean llama.cpp\?"):
        peers.get("lama.cpp")


def test_what_is_not_here_or_cannot_is_a_row(monkeypatch, tmp_path):
    shapes = [linear.Shape(2, 8, 8)]
    monkeypatch.setattr(peers.Peer, "installed", property(lambda self: False))
    raced = Race(linear.BASELINE)
    raced.run(peers.linear(list(peers.FILES), shapes, 1), linear.work(shapes), 1)
    assert [t.reason for t in raced.timings] == [f"is not installed: {peers.get(n).install}" for n in peers.FILES]
    monkeypatch.setattr(peers.Peer, "installed", property(lambda self: True))
    raced = Race(linear.BASELINE)
    raced.run(peers.linear(["llama.cpp"], shapes, 1), linear.work(shapes), 1)
    assert raced.timings[0].reason == "runs whole models only"
    prompt, stored = language.prompt(models.llama(), 4, 2), language.Stored.of(models.llama(), tmp_path)
    raced = Race(linear.BASELINE)
    raced.run(peers.language(["openvino"], stored, prompt, 1), language.work(prompt), 1)
    assert [t.reason for t in raced.timings] == ["is measured on linear layers only"] * 2


def test_compiled_ways_only_if_asked(monkeypatch):
    monkeypatch.setattr(peers.Peer, "installed", property(lambda self: True))
    shapes = [linear.Shape(2, 8, 8)]
    plain, both = (peers.linear(["torchao"], shapes, 1, compiled) for compiled in (False, True))
    assert [c.name for c in plain] == ["torchao int8-dynamic", "torchao int8-weight-only"]
    assert {c.name for c in both} == {c.name for c in plain} | {f"{c.name}, compiled" for c in plain}


@pytest.mark.parametrize("family", ["llama", "tied_llama", "qwen2"])
def test_what_llama_cpp_gets_is_the_model(family, tmp_path):
    """transformers, reading the file, undoes the order of rows and the Q8_0 by code of its own."""
    torch.manual_seed(0)
    model = models.FAMILIES[family]()
    llama_cpp.write(model, tmp_path / "model.gguf")
    told = gguf.header(tmp_path / "model.gguf")
    assert {info.dtype for info in told.tensors.values()} == {"Q8_0", "F32"}
    assert ("output.weight" in told.tensors) == (family != "tied_llama")
    again = gguf.load(tmp_path / "model.gguf")
    assert ov.sqnr(models.logits(model), models.logits(again)) > 30


def test_what_llama_cpp_does_not_get(tmp_path):
    with pytest.raises(ov.OctavoError, match="is compared on llama, mistral, qwen2, qwen3 only, not gpt2"):
        llama_cpp.write(models.gpt2(), tmp_path / "model.gguf")
    model = models.llama()
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4}
    with pytest.raises(ov.OctavoError, match="llama3 rotary embeddings"):
        llama_cpp.write(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HERE, reason="none is installed")
def test_peers_that_are_here_run(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "cache_size", lambda: 1)
    shapes = [linear.Shape(rows, 64, 32) for rows in (1, 20)]
    raced = Race(linear.BASELINE)
    raced.run(peers.linear(HERE, shapes, 1), linear.work(shapes), 1)
    assert {t.reason for t in raced.timings} <= {"", "runs whole models only"}
    model = models.llama()
    prompt = language.prompt(model, 16, 4)
    raced = Race(linear.BASELINE)
    raced.run(peers.language(HERE, language.Stored.of(model, tmp_path), prompt, 1), language.work(prompt), 1)
    assert {t.reason for t in raced.timings} <= {"", "is measured on linear layers only"}


def test_llama_cpp_gives_our_logits(tmp_path):
    pytest.importorskip("llama_cpp")
    import ctypes

    model = models.llama()
    setting = Setting(model, language.prompt(model, 16, 4), 1, tmp_path)
    llama_cpp.write(model, tmp_path / "model.gguf")
    engine = llama_cpp._engine(tmp_path / "model.gguf", setting)
    engine.eval(setting.prompt.ids[0].tolist())
    found = ctypes.cast(engine._ctx.get_logits(), ctypes.POINTER(ctypes.c_float * models.VOCABULARY)).contents
    with torch.no_grad():
        expected = model(input_ids=setting.prompt.ids).logits[0, -1]
    assert ov.sqnr(expected, torch.tensor(list(found))) > 25


def test_ctranslate2_gives_our_logits(tmp_path):
    library = pytest.importorskip("ctranslate2")
    from octavo.analysis.bench.peers import ctranslate2

    model = models.llama()
    setting = Setting(model, language.prompt(model, 16, 4), 1, tmp_path / "made")
    ctranslate2._convert(setting)
    generator = library.Generator(str(setting.folder), device="cpu", compute_type="int8", intra_threads=1)
    found = generator.forward_batch([setting.prompt.ids[0].tolist()]).to(library.DataType.float32)
    with torch.no_grad():
        expected = model(input_ids=setting.prompt.ids).logits[0, -1]
    assert ov.sqnr(expected, torch.tensor(numpy.array(found))[0, -1]) > 25
