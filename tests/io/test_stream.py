"""From file to file: bit for bit what a whole model gives, in little memory, and after any kind of fall."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import octavo as ov
from octavo import Cast, Constant, Current, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, Scheme
from octavo.core import formats, schemes
from octavo.io import checkpoint, folder, huggingface, safe_files, stream, strips
from tests.nn import models

LAYOUTS = checkpoint.LAYOUTS


@pytest.fixture(autouse=True)
def _small_strips(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 3000)
    transformers.utils.logging.disable_progress_bar()


def whole(source, out, rules, layout="auto", dtype=None):
    """The same by way of a model."""
    opened = huggingface.open_model(source, dtype)
    ov.quantize_(opened.model, rules)
    layout = checkpoint.layout_for(opened.model)[0] if layout == "auto" else layout
    checkpoint.save(opened.model, out, layout, opened.tokenizer)


def streamed(source, out, rules, layout="auto", dtype=None, shard=40_000, **more):
    return stream.run(stream.plan(source, rules, layout, dtype), out, shard=shard, **more)


def tensors(place):
    return {
        n: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).tolist()) for n, t in safe_files.read(place)
    }


def same_folder(one, other):
    words = [{p.name: p.read_text() for p in place.iterdir() if ".safetensors" not in p.name} for place in (one, other)]
    assert words[0] == words[1]
    found = [tensors(place) for place in (one, other)]
    assert list(found[0].keys() ^ found[1].keys()) == []
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def check(tmp_path, rules, layout="auto", dtype=None, source="source"):
    whole(tmp_path / source, tmp_path / "whole", rules, layout, dtype)
    result = streamed(tmp_path / source, tmp_path / "out", rules, layout, dtype)
    same_folder(tmp_path / "out", tmp_path / "whole")
    return result


def written(tmp_path, model, **more):
    torch.manual_seed(0)
    model.save_pretrained(tmp_path / "source", **more)
    return tmp_path / "source"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-weight-only"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family, scheme, layout, tmp_path):
    source = written(tmp_path, models.FAMILIES[family]().bfloat16(), max_shard_size="60KB")
    if family == "gpt2" and layout == "compressed-tensors":
        with pytest.raises(OctavoError, match=r"Conv1D.*layout='octavo'"):
            stream.plan(source, scheme, layout)
        return
    result = check(tmp_path, scheme, layout)
    assert len(result.files) > 1
    again = ov.load(tmp_path / "out")
    assert torch.equal(models.logits(again), models.logits(ov.load(tmp_path / "whole")))


@pytest.mark.parametrize("name", [n for n in schemes.NAMES if not schemes.get(n).static and not schemes.alpha(n)])
def test_named_schemes(name, tmp_path):
    dtypes = itertools.cycle([torch.bfloat16, torch.float32, torch.float16, torch.float64])
    dtype = next(itertools.islice(dtypes, [*schemes.NAMES].index(name), None))
    written(tmp_path, models.llama(hidden_size=80, intermediate_size=136).to(dtype))
    check(tmp_path, name)


INT8, E4M3FN = formats.INT8, formats.E4M3FN
UNUSUAL = {
    "a scale a matrix, shared by stacks": Scheme(Cast(INT8)),
    "a scale an input": Scheme(Cast(INT8, PerChannel(1))),
    "a scale for all, power of two": Scheme(Cast(E4M3FN, PerTensor(), Current(power_of_two=True))),
    "constant": Scheme(Cast(E4M3FN, PerTensor(), Constant(0.25))),
    "tiles larger than a strip": Scheme(Cast(INT8, PerBlock(60, 50))),
    "tiles higher than a matrix": Scheme(Cast(INT8, PerBlock(1000, 16))),
    "affine": Scheme(Cast(formats.UINT8, PerGroup(24), affine=True)),
    "affine for all": Scheme(Cast(INT8, PerTensor(), affine=True)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_schemes(name, dtype, tmp_path):
    written(tmp_path, models.llama().to(dtype))
    check(tmp_path, UNUSUAL[name])


MIXED = {
    "lm_head": "int8-weight-only",
    "model.embed_tokens": "int8-group64",
    "*down_proj": "fp8-dynamic",
    "*k_proj": None,
    "*": "int8-dynamic",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "tied_llama"])
def test_rules_heads_and_tables(family, layout, tmp_path):
    written(tmp_path, models.FAMILIES[family]())
    rules = {k: v for k, v in MIXED.items() if layout == "octavo" or k != "model.embed_tokens"}
    check(tmp_path, rules, layout)


def test_convolutions_and_computed_weights(tmp_path):
    config = transformers.Wav2Vec2Config(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
        **{"conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 8},
        **{"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "vocab_size": 12},
    )
    written(tmp_path, transformers.Wav2Vec2ForCTC(config))
    check(tmp_path, "int8-weight-only")
    schemes_of = json.loads((tmp_path / "out" / "octavo.json").read_text())["layers"]
    assert any("pos_conv" in name for name in schemes_of)


def test_buffers_of_a_picture_network(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    written(tmp_path, transformers.ResNetForImageClassification(config).bfloat16())
    check(tmp_path, "fp8-dynamic")


def test_tokenizer_and_words_come_along(tmp_path):
    from tests.cli.conftest import tokenizer

    model = models.llama()
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    source = written(tmp_path, model)
    tokenizer().save_pretrained(source)
    check(tmp_path, "int8-dynamic")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "0.3" in (tmp_path / "out" / "generation_config.json").read_text()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32], ids=str)
def test_numbers_of_several_dtypes(dtype, tmp_path):
    source = written(tmp_path, models.llama().bfloat16())
    state = load_file(source / "model.safetensors")
    state = {n: t.float() if "norm" in n else t.double() if "up_proj" in n else t for n, t in state.items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    check(tmp_path, "int8-dynamic", dtype=dtype)


def test_config_without_a_dtype(tmp_path):
    source = written(tmp_path, models.llama().bfloat16(), max_shard_size="60KB")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    check(tmp_path, "int8-dynamic")


def test_figures_and_progress(tmp_path):
    source = written(tmp_path, models.tied_llama())
    plan, seen = stream.plan(source, "int8-dynamic"), []
    result = stream.run(plan, tmp_path / "out", advance=seen.append)
    assert sum(seen) == result.read == plan.bytes_before == sum(x.nbytes for x in safe_files.tensors(source).values())
    assert plan.bytes_after == sum(x.nbytes for x in safe_files.tensors(tmp_path / "out").values())
    assert result.resumed == 0
    assert result.files == ["model.safetensors"]
    layers = json.loads((tmp_path / "out" / "octavo.json").read_text())["layers"]
    assert [x.name for x in plan.reports() if x.scheme == "int8-dynamic"] == [*layers]


def test_by_one_call(tmp_path):
    source, seen = written(tmp_path, models.tied_llama()), []
    whole(source, tmp_path / "whole", "int8-dynamic")
    summary = ov.quantize_checkpoint(source, tmp_path / "out", "int8-dynamic", advance=seen.append)
    same_folder(tmp_path / "out", tmp_path / "whole")
    assert sum(seen) == summary.bytes_before
    opened = huggingface.open_model(source)
    whole_way = ov.quantize_(opened.model, "int8-dynamic")
    assert [(x.name, x.scheme, x.reason) for x in summary.layers] == [
        (x.name, x.scheme, x.reason) for x in whole_way.layers
    ]
    assert not any("layout" in note for note in summary.notes)
    summary = ov.quantize_checkpoint(source, tmp_path / "own", "e5m2-dynamic")
    assert any("own layout" in note for note in summary.notes)


@pytest.mark.parametrize("size", [1, 777, 20_001, 10**9])
def test_shards_of_any_size(tmp_path, size):
    source = written(tmp_path, models.llama().half(), max_shard_size="13KB")
    whole(source, tmp_path / "whole", "fp8-dynamic")
    result = streamed(source, tmp_path / "out", "fp8-dynamic", shard=size)
    same_folder(tmp_path / "out", tmp_path / "whole")
    assert (len(result.files) == 1) == (size == 10**9)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors"])
def test_an_index_that_leaves_its_folder(tmp_path, shard):
    source = written(tmp_path, models.llama(), max_shard_size="60KB")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(OctavoError, match="no safetensors file in this folder"):
        ov.quantize_checkpoint(source, tmp_path / "out", "int8-dynamic")
    assert not (tmp_path / "out").exists()


def test_a_model_s_weights_are_never_held(tmp_path):
    source = written(tmp_path, models.llama())
    plan = stream.plan(source, "int8-dynamic")
    assert {t.device.type for t in (*plan.source.model.parameters(), *plan.source.model.buffers())} == {"meta"}


# what falls


def fail_after(monkeypatch, writes, error):
    """The file system as it is, until so many writes are done."""
    real, left = os.pwrite, itertools.count(writes, -1)

    def pwrite(descriptor, data, offset):
        if next(left) <= 0:
            raise error
        return real(descriptor, data[:1000], offset)  # and never much at once

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("writes", [0, 1, 7, 60, 150])
def test_a_full_disk_keeps_what_is_written(tmp_path, monkeypatch, writes):
    source = written(tmp_path, models.llama())
    whole(source, tmp_path / "whole", "int8-dynamic")
    with monkeypatch.context() as patch:
        fail_after(patch, writes, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OctavoError, match=r"the disk is full; .* kept in .*\.octavo-out\.unfinished"):
            streamed(source, tmp_path / "out", "int8-dynamic")
    assert not (tmp_path / "out").exists()
    result = streamed(source, tmp_path / "out", "int8-dynamic")
    assert (result.resumed > 0) == (writes >= 60)
    same_folder(tmp_path / "out", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


KILLED = """
import os, random, shutil, signal, sys
import torch
torch.set_num_threads(1)
from octavo.io import folder, shards, stream, strips
source, out, seed = sys.argv[1:]
strips.STRIP = 3000
plan = stream.plan(source, "int8-dynamic")
choose, resumed = random.Random(int(seed)), 0

def die_after(nbytes):
    real, left = os.pwrite, [nbytes]
    def pwrite(descriptor, data, offset):
        if len(data) > left[0]:
            real(descriptor, data[: left[0]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= len(data)
        return real(descriptor, data, offset)
    os.pwrite = pwrite

for turn in range(12):
    child = os.fork()
    if child == 0:
        die_after(choose.randrange(1, 60_000) + 7 * turn)
        stream.run(plan, out, shard=50_000)
        os._exit(0)
    choose.random()
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not os.path.exists(out)
else:
    resumed = stream.run(plan, out, shard=50_000).resumed
print(turn, resumed)
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_byte(tmp_path, seed):
    source = written(tmp_path, models.llama())
    whole(source, tmp_path / "whole", "int8-dynamic")
    words = [sys.executable, "-c", KILLED, source, tmp_path / "out", str(seed)]
    said = subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    turns, _ = map(int, said.stdout.split())
    assert turns > 1
    same_folder(tmp_path / "out", tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


def interrupted(tmp_path, source, rules="int8-dynamic", writes=60, **more):
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, writes, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            streamed(source, tmp_path / "out", rules, **more)
    assert folder.unfinished(tmp_path / "out").is_dir()


def test_other_rules_do_not_go_on_with_it(tmp_path):
    source = written(tmp_path, models.llama())
    interrupted(tmp_path, source)
    with pytest.raises(
        OctavoError, match=r"unfinished run with another set of rules.*remove that folder or use --force"
    ):
        streamed(source, tmp_path / "out", "int8-weight-only")
    with pytest.raises(OctavoError, match="another set of rules"):
        streamed(source, tmp_path / "out", "int8-dynamic", shard=10**6)
    assert streamed(source, tmp_path / "out", "fp8-dynamic", force=True).resumed == 0
    whole(source, tmp_path / "whole", "fp8-dynamic")
    same_folder(tmp_path / "out", tmp_path / "whole")


def test_another_source_does_not_go_on_with_it(tmp_path):
    source = written(tmp_path, models.llama())
    interrupted(tmp_path, source)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(OctavoError, match="another source"):
        streamed(source, tmp_path / "out", "int8-dynamic")


def test_a_copy_of_the_source_does(tmp_path):
    source = written(tmp_path, models.llama())
    interrupted(tmp_path, source)
    shutil.copytree(source, tmp_path / "copy")
    assert streamed(tmp_path / "copy", tmp_path / "out", "int8-dynamic").resumed > 0


def test_the_output_is_looked_at_first(tmp_path):
    source = written(tmp_path, models.llama())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OctavoError, match=r"not be replaced|not empty"):
            streamed(source, tmp_path / "out", "int8-dynamic", force=force)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_no_room(tmp_path, monkeypatch):
    source = written(tmp_path, models.llama())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(OctavoError, match=r"out will have .*1e\+03 bytes|1 kB.*Make room"):
        streamed(source, tmp_path / "out", "int8-dynamic")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("name", "layer"), [("q_proj.weight", "q_proj"), ("q_proj.bias", "q_proj")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path, name, layer, bad):
    source = written(tmp_path, models.qwen2().bfloat16())
    state = load_file(source / "model.safetensors")
    state[f"model.layers.1.self_attn.{name}"].view(-1)[-1] = bad
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(OctavoError, match=rf"1\.self_attn\.{name} holds NaN or Inf.*rule for '.*{layer}'"):
        streamed(source, tmp_path / "out", "int8-dynamic")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    check(tmp_path, {"*.1.self_attn.q_proj": None, "*": "int8-dynamic"})


def test_files_that_are_cut_off(tmp_path):
    source = written(tmp_path, models.llama())
    file = source / "model.safetensors"
    plan = stream.plan(source, "int8-dynamic")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(OctavoError, match=r"model\.safetensors was cut off while it was read"):
        stream.run(plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    with pytest.raises(OctavoError, match="is cut off"):
        stream.plan(source, "int8-dynamic")


def test_a_source_that_changes_meanwhile(tmp_path):
    source = written(tmp_path, models.llama())
    plan = stream.plan(source, "int8-dynamic")
    with pytest.raises(OctavoError, match="was changed while it was read"):
        stream.run(plan, tmp_path / "out", advance=lambda count: os.utime(source / "model.safetensors", (count, 1)))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ("int8-static", "q_proj: int8-static needs calibration.*dynamic or a weight-only scheme"),
        ({"*.nothing": "int8-dynamic"}, "matches no layer"),
        ([ov.Rule("int8-dynamic", smooth=0.5)], "smooths or rounds by data"),
        ([ov.Rule("int8-weight-only", rounding="gptq")], "smooths or rounds by data"),
    ],
)
def test_rules_that_cannot_be(tmp_path, rules, match):
    source = written(tmp_path, models.llama())
    with pytest.raises(OctavoError, match=match):
        stream.plan(source, rules)


def test_what_is_no_folder_of_safetensors(tmp_path):
    source = written(tmp_path, models.llama())
    streamed(source, tmp_path / "out", "int8-dynamic")
    with pytest.raises(OctavoError, match=r"already 8-bit|already quantized"):
        stream.plan(tmp_path / "out", "int8-dynamic")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(OctavoError, match="only safetensors can be streamed"):
        stream.plan(tmp_path / "a.gguf", "int8-dynamic")
    (source / "model.safetensors").unlink()
    with pytest.raises(OctavoError, match="holds no weights"):
        stream.plan(source, "int8-dynamic")
