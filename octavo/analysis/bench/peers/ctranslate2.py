"""CTranslate2: an engine of its own for transformers, INT8 with a scale a channel and a token; whole models only.

It decodes by itself and tells of every token, so the time of decoding is that from the first token to the last.
"""

import copy
import time
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from octavo.analysis.bench.language import DECODE, PREFILL
from octavo.analysis.bench.peers import Models, Peer, Setting
from octavo.analysis.bench.race import Task
from octavo.errors import OctavoError

NAME = "ctranslate2 int8"


def _convert(setting: Setting) -> None:
    """The model in CTranslate2's files; numbered tokens stand in for a vocabulary."""
    loaders: Any = import_module("ctranslate2.converters.transformers")._MODEL_LOADERS
    model: Any = copy.deepcopy(setting.model).float()  # loaders take it apart
    kind = type(model.config).__name__
    if kind not in loaders:
        raise OctavoError(f"has no converter for {kind}")
    words = [_word(i) for i in range(model.config.vocab_size)]
    special = {"bos_token": words[0], "eos_token": words[1], "unk_token": words[2]}
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, **special)
    spec = loaders[kind](model, tokenizer)
    spec.validate()
    spec.optimize(quantization="int8")
    setting.folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(setting.folder))


def _word(token: int) -> str:
    return f"<{token}>"


def _model(setting: Setting) -> dict[str, Task]:
    library: Any = import_module("ctranslate2")
    _convert(setting)
    generator = library.Generator(
        str(setting.folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=setting.threads
    )
    words = [_word(token) for token in setting.prompt.ids[0].tolist()]

    def generate(start: list[str], new: int, told: Any = None) -> None:
        settings = {"beam_size": 1, "include_prompt_in_result": False, "callback": told}
        generator.generate_batch([start], max_length=new, min_length=new, **settings)

    def decode() -> float:
        clock: list[float] = []
        generate(words[: setting.prompt.context], 1 + setting.prompt.new, lambda _: clock.append(time.perf_counter()))
        return clock[setting.prompt.new] - clock[0]

    return {PREFILL: Task(lambda: generate(words, 1)), DECODE: Task(decode, own_clock=True)}


def _models() -> Models:
    return {NAME: _model}


PEER = Peer("ctranslate2", "ctranslate2", "pip install ctranslate2", models=_models)
