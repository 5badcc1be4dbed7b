"""GGUF, llama.cpp's single-file format, read as an ordinary float model.

A GGUF file is a list of metadata, a table of tensors, and their bytes. `header` walks the first two by the format's
rules, trusting no count or length beyond what the file holds; only then may transformers open the file. `load` gives a
model whose weights are unpacked to floats and which has forgotten that it came from GGUF, so that it can be quantized
and saved like any other.
"""

import math
import mmap
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.errors import OctavoError, OctavoWarning
from octavo.io import loading
from octavo.io.safe_files import TensorInfo, check_regular, listed, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4  # ggml's
MAX_NAME = 65535
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_AGAIN = "Download it again."


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself; of an array in the metadata only the length is kept."""

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def header(file: str | os.PathLike[str]) -> Header:
    """Metadata and tensors of a GGUF file, once the whole table has proved true."""
    file = Path(file)
    check_regular(file)
    try:
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF" or os.fstat(opened.fileno()).st_size < 24:
                raise OctavoError(f"{file} is not a GGUF file: it does not begin like one. {_AGAIN}")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(file, data).header()
    except OSError as error:
        raise OctavoError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None


def load(file: str | os.PathLike[str], dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """The model in a GGUF file, its weights unpacked to `dtype` (float32 when none is given)."""
    file = Path(file)
    told = header(file)
    transformers = loading.require("transformers")
    loading.require("accelerate")
    _check_supported(file, told)
    arguments: dict[str, Any] = {"gguf_file": file.name, "dtype": dtype or torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer transformers may keep the weights packed
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with loading.transformers_on(file):
        config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        model_class = _model_class(transformers, config)
    model = loading.load(
        file, model_class, config, told.tensors.values(), pretrained_model_name_or_path=file.parent, **arguments
    )
    _warn_of_lost(file, told, model)
    return _forget(model)


def tokenizer(file: str | os.PathLike[str]) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in a GGUF file, or None if it holds none."""
    file = Path(file)
    if "tokenizer.ggml.tokens" not in header(file).metadata:
        return None
    transformers = loading.require("transformers")
    with loading.transformers_on(f"the tokenizer in {file}"):
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    return found


def _check_supported(file: Path, told: Header) -> None:
    if told.metadata.get("split.count", 1) not in (0, 1):
        raise OctavoError(
            f"{file} is one of several parts. Join them first: llama-gguf-split --merge {file} whole.gguf"
        )
    blocks = told.metadata.get(f"{told.architecture}.block_count", 0)
    if not isinstance(blocks, int) or not 0 <= blocks <= len(told.tensors):
        raise OctavoError(f"{file} claims {show(blocks)} layers, but it has only {len(told.tensors)} tensors. {_AGAIN}")


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the configuration names, or the language model of its family."""
    for name in getattr(config, "architectures", None) or ():
        if isinstance(named := getattr(transformers, name, None), type):
            return named
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise OctavoError(f"transformers has no language model of type {config.model_type}.")


def _warn_of_lost(file: Path, told: Header, model: "PreTrainedModel") -> None:
    """Transformers' older reader drops tensors it has no name for, without a word."""
    lost = [name for name in told.tensors if name.startswith("rope_")]
    stored = sum(math.prod(info.shape) for name, info in told.tensors.items() if name not in lost)
    kept = sum(parameter.numel() for parameter in model.parameters())
    if lost or stored > kept + sum(buffer.numel() for buffer in model.buffers()):
        names = f": {listed(lost)}" if lost else f" ({stored:,} numbers in the file, {kept:,} in the model)"
        warnings.warn(
            f"{file}: transformers leaves some tensors unused{names}. The model may differ from the original; "
            "prefer its safetensors checkpoint.",
            OctavoWarning,
            stacklevel=3,
        )


def _forget(model: "PreTrainedModel") -> "PreTrainedModel":
    """Remove what would make `save_pretrained` refuse: the model is plain floats now."""
    for name in ("hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if "is_quantized" in vars(model):
        model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    return model


class _Walk:
    """One pass over the bytes before the tensors' data, from the start, never past the end."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.position = file, data, 4
        self.size = len(data)

    def header(self) -> Header:
        version = self.number("<I", "the version")
        if version not in VERSIONS:
            big = " (it is big-endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
            raise OctavoError(f"{self.file} is GGUF version {version}{big}, not {VERSIONS}. Convert it again.")
        tensor_count, metadata_count = self.number("<Q", "a count"), self.number("<Q", "a count")
        self.room(metadata_count, 13, "metadata entries")
        self.room(tensor_count, 25, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self.name("a metadata key")
            if key in metadata:
                raise OctavoError(f"{self.file}: the metadata has {show(key)} twice. {_AGAIN}")
            metadata[key] = self.value(self.number("<I", f"the type of {show(key)}"), key)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise OctavoError(f"{self.file} does not say its architecture (general.architecture). Convert it again.")
        return Header(architecture, metadata, self.tensors(tensor_count, metadata.get("general.alignment", 32)))

    def tensors(self, count: int, alignment: Any) -> dict[str, TensorInfo]:
        if not (type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0):
            raise OctavoError(f"{self.file}: the alignment {show(alignment)} is not a power of two. {_AGAIN}")
        spans: list[tuple[int, int, str]] = []
        found: dict[str, TensorInfo] = {}
        for _ in range(count):
            name = self.name("a tensor's name")
            if name in found:
                raise OctavoError(f"{self.file}: tensor {show(name)} appears twice. {_AGAIN}")
            found[name], offset = self.tensor(name)
            if offset % alignment:
                raise OctavoError(f"{self.file}: tensor {show(name)} is not aligned to {alignment} bytes. {_AGAIN}")
            spans.append((offset, offset + found[name].nbytes, name))
        start = -(-self.position // alignment) * alignment
        expected = 0
        for begin, end, name in sorted(spans):
            if start + end > self.size:
                raise OctavoError(
                    f"{self.file} is cut off: tensor {show(name)} ends at byte {start + end}, but the file has only "
                    f"{self.size}. {_AGAIN}"
                )
            if begin < expected:
                raise OctavoError(f"{self.file}: tensor {show(name)} overlaps the tensor before it. {_AGAIN}")
            expected = end
        return found

    def tensor(self, name: str) -> tuple[TensorInfo, int]:
        """One row of the table: dimensions (fastest first), type, and where the bytes start."""
        where = f"tensor {show(name)}"
        rank = self.number("<I", where)
        if rank > MAX_DIMENSIONS:
            raise OctavoError(f"{self.file}: {where} has {rank} dimensions, more than {MAX_DIMENSIONS}. {_AGAIN}")
        shape = tuple(self.number("<Q", where) for _ in range(rank))[::-1]
        kind, offset = self.number("<I", where), self.number("<Q", where)
        gguf = loading.require("gguf")
        try:
            kind = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise OctavoError(
                f"{self.file}: {where} has the unknown type {kind}. {_AGAIN} If it is new: pip install -U gguf"
            ) from None
        if math.prod(n for n in shape if n) >= 2**63 or (shape[-1] if shape else 1) % block:
            raise OctavoError(f"{self.file}: {where} has the impossible shape {shape} for {kind.name}. {_AGAIN}")
        return TensorInfo(self.file, kind.name, shape, math.prod(shape) // block * block_bytes), offset

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], show(key))
        if kind == _STRING:
            return self.text(self.number("<Q", show(key)), show(key))
        if kind == _ARRAY:
            kind, count = self.number("<I", show(key)), self.number("<Q", show(key))
            if kind in _SCALARS:
                self.skip(count * struct.calcsize(_SCALARS[kind]), show(key))
                return count
            if kind == _STRING:
                self.room(count, 8, f"strings in {show(key)}")
                for _ in range(count):
                    self.skip(self.number("<Q", show(key)), show(key))
                return count
        raise OctavoError(f"{self.file}: metadata {show(key)} has the unknown type {kind}. {_AGAIN}")

    def name(self, what: str) -> str:
        length = self.number("<Q", what)
        if not 0 < length <= MAX_NAME:
            raise OctavoError(f"{self.file}: {what} is {length} bytes long. {_AGAIN}")
        return self.text(length, what)

    def text(self, length: int, what: str) -> str:
        start = self.position
        self.skip(length, what)
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            raise OctavoError(f"{self.file}: {what} is not UTF-8. {_AGAIN}") from None

    def number(self, layout: str, what: str) -> Any:
        start = self.position
        self.skip(struct.calcsize(layout), what)
        return struct.unpack_from(layout, self.data, start)[0]

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise OctavoError(
                f"{self.file} is cut off: {what} takes {count} bytes at byte {self.position}, but the file has only "
                f"{self.size}. {_AGAIN}"
            )
        self.position += count

    def room(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.position:
            raise OctavoError(f"{self.file} claims {count} {what}, more than its {self.size} bytes can hold. {_AGAIN}")
