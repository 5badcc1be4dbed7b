"""Tiny models with a byte-level tokenizer, made once; `octavo(...)` runs the command in this process."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from octavo.cli.main import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
END = {"bos_token_id": None, "eos_token_id": None}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | END | {"max_position_embeddings": 64}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", END | {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL),
}


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, (architecture, config, arguments) in MODELS.items():
        torch.manual_seed(0)
        getattr(transformers, architecture)(getattr(transformers, config)(**arguments)).save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A current folder with llama, gpt2 and bert in it."""
    for name in MODELS:
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def octavo(capsys):
    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        found = (
            json.loads(said.out, parse_constant=lambda x: pytest.fail(x)) if "--json" in words and not code else None
        )
        return SimpleNamespace(code=code, out=said.out, err=said.err, json=found)

    return run
