"""llama.cpp: Q8_0, INT8 with a scale for every 32 numbers on both sides, by its Python package; whole models only.

The model is written as a GGUF of ours without a vocabulary: tokens go in, logits come out.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.analysis.bench.language import DECODE, PREFILL, Prompt
from octavo.analysis.bench.peers import Models, Peer, Setting
from octavo.analysis.bench.race import Task
from octavo.errors import OctavoError

NAME = "llama.cpp Q8_0"
BLOCK = 32
#: transformers' model types, llama.cpp's name of the architecture, and whether it turns pairs of neighbours (rotary).
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}


def write(model: Any, file: Path) -> None:
    """The model as a GGUF in Q8_0; vectors, and matrices that do not divide into blocks, stay float."""
    gguf: Any = import_module("gguf")
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise OctavoError(f"is compared on {', '.join(ARCHITECTURES)} only, not {config.model_type}")
    rotary = config.rope_parameters
    if rotary.get("rope_type", "default") != "default":
        raise OctavoError(f"is not compared on models with {rotary['rope_type']} rotary embeddings")
    kind, neighbours = ARCHITECTURES[config.model_type]
    architecture = gguf.MODEL_ARCH[kind]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    tied = getattr(config, "tie_word_embeddings", False)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stem, _, kind = name.rpartition(".")
        if neighbours and stem.endswith(("q_proj", "k_proj")):
            tensor = paired(tensor, heads if stem.endswith("q_proj") else kv_heads)
        whole = tensor.float().contiguous().cpu().numpy()
        packed = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 and tensor.shape[1] % BLOCK == 0 else None
        data = whole if packed is None else gguf.quants.quantize(whole, packed)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", data, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows so that the two numbers that rotary embeddings turn together stand side by side, as llama.cpp wants them."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)


def _model(setting: Setting) -> dict[str, Task]:
    setting.folder.mkdir(parents=True, exist_ok=True)
    file = setting.folder / "model.gguf"
    write(setting.model, file)
    engine, prompt = _engine(file, setting), setting.prompt
    tokens, fed = prompt.ids[0].tolist(), [int(token) for token in prompt.fed]

    def read(some: list[int]) -> None:
        engine.reset()
        engine.eval(some)

    def decode() -> None:
        for token in fed:
            engine.eval([token])

    return {
        PREFILL: Task(lambda: read(tokens)),
        DECODE: Task(decode, lambda: read(tokens[: prompt.context])),
    }


def _engine(file: Path, setting: Setting) -> Any:
    library: Any = import_module("llama_cpp")
    return library.Llama(
        str(file),
        n_ctx=_room(setting.prompt),
        n_batch=setting.prompt.length,
        n_ubatch=setting.prompt.length,
        n_threads=setting.threads,
        n_threads_batch=setting.threads,
        verbose=False,
    )


def _room(prompt: Prompt) -> int:
    return max(prompt.length, prompt.context + prompt.new)


def _models() -> Models:
    return {NAME: _model}


PEER = Peer("llama.cpp", "llama_cpp", "pip install llama-cpp-python", models=_models)
