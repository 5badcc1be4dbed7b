"""Which bytes of which files every tensor of a model is made of, found out without reading one of them.

transformers renames tensors while it loads them, cuts fused ones, and joins the experts of a mixture. What it does is
watched here on tensors of the meta device, which have shapes and no numbers: a tensor of the model then is a sequence
of runs of bytes, or it is something that only the whole numbers can tell.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.errors import OctavoError, OctavoWarning
from octavo.io import huggingface, loading
from octavo.io.safe_files import TensorInfo, show

#: The numbers of safetensors files that torch has.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
MOST_PIECES = 100_000  # of one tensor; beyond, its numbers are interleaved rather than joined


@dataclass(frozen=True)
class Run:
    """Bytes of a file that belong together."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Stored:
    """The numbers of a tensor as they lie in files: one run after the other, row by row."""

    dtype: torch.dtype
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(run.nbytes for run in self.runs)


@dataclass(frozen=True)
class Traced:
    """A model on the meta device, the files it comes from, and where its tensors' numbers lie, as far as they do."""

    folder: Path
    model: nn.Module
    infos: Mapping[str, TensorInfo]
    stored: Mapping[str, Stored]

    def of(self, name: str) -> Stored:
        """Where the numbers of a tensor of the model lie. Raises ``OctavoError`` if nowhere."""
        if name not in self.stored:
            raise OctavoError(
                f"{self.folder}: {name} is no tensor of the files, nor made of parts of them that lie in a row; "
                "transformers computes it. The model has to be opened whole"
            )
        return self.stored[name]


def trace(folder: Path, dtype: torch.dtype | None = None) -> Traced:
    """The model of a checkpoint folder as ``huggingface.open_model`` would give it, but for its numbers.

    Raises what that raises of a damaged folder.
    """
    raw, infos = huggingface.check_folder(folder)
    unreadable = [name for name, info in infos.items() if info.dtype not in DTYPES]
    if unreadable:
        kind = infos[unreadable[0]].dtype
        raise OctavoError(f"{folder}: torch has no numbers of {kind}, the dtype of tensor {show(unreadable[0])}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OctavoWarning)  # the second time says them again
        stored = _watch(folder, raw, infos)
    # by file and name, as transformers meets them: the first one's dtype may decide
    names = sorted(infos, key=lambda name: (infos[name].file.name, name))
    state = {name: torch.empty(infos[name].shape, dtype=DTYPES[infos[name].dtype], device="meta") for name in names}
    model = _load(folder, raw, infos, state, dtype or "auto")
    _read_generation_config(folder, model)
    return Traced(folder, model, infos, stored)


def _watch(folder: Path, raw: dict[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    """What becomes of the files' tensors, all of one dtype, so that none is converted and all can be recognized."""
    state = {}
    for name, info in infos.items():
        own = DTYPES[info.dtype]
        like = torch.float32 if own.is_floating_point else own
        state[name] = torch.empty(info.shape, dtype=like, device="meta")
    with _Watch(state) as watch:
        model = _load(folder, raw, infos, state, torch.float32)
    found = {}
    for name, tensor in model.state_dict().items():
        pieces = watch.pieces_of(tensor)
        if tensor.numel() == 0:
            found[name] = Stored(tensor.dtype, ())
        elif pieces is not None and len({infos[source].dtype for source, _, _ in pieces}) == 1:
            found[name] = Stored(DTYPES[infos[pieces[0][0]].dtype], tuple(_runs(pieces, infos)))
    return found


def _load(
    folder: Path, raw: dict[str, Any], infos: Mapping[str, TensorInfo], state: dict[str, Tensor], dtype: Any
) -> nn.Module:
    model_class, settings = huggingface.architecture(folder, raw)
    model: nn.Module = loading.load(
        folder,
        model_class,
        settings,
        infos.values(),
        pretrained_model_name_or_path=None,
        state_dict=state,
        dtype=dtype,
        device_map={"": "meta"},
    )
    return model


def _read_generation_config(folder: Path, model: Any) -> None:
    """As transformers reads it when it opens a folder: from its file, or else from words of the config."""
    if not model.can_generate():
        return
    transformers = loading.require("transformers")
    own = (folder / "generation_config.json").exists()
    where = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    with loading.transformers_on(folder):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True, **where)


#: Some numbers of one tensor of the files: its name, the first of them, how many.
_Piece = tuple[str, int, int]


class _Watch(TorchDispatchMode):
    """Knows of every storage on the meta device what it is made of, if that is pieces of the sources in a row."""

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._alive = list(sources.values())  # the address of a storage is its own only while it lives
        self._made_of = {_address(x): [(name, 0, x.numel())] for name, x in sources.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.ops.aten.cat.default, torch.ops.aten.stack.default):
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
            self._remember(out, self._joined(args[0], math.prod(out.shape[:dim])))
        elif func is torch.ops.aten.clone.default and out.is_contiguous():
            self._remember(out, self.pieces_of(args[0]))
        return out

    def pieces_of(self, tensor: Tensor) -> list[_Piece] | None:
        """The pieces whose numbers, one after the other, are the tensor's, row by row; None if it is no such thing."""
        pieces = self._made_of.get(_address(tensor))
        if pieces is None or not tensor.is_contiguous():
            return None
        return _cut(pieces, int(tensor.storage_offset()), tensor.numel())

    def _remember(self, tensor: Tensor, pieces: list[_Piece] | None) -> None:
        if pieces is not None:
            self._alive.append(tensor)
            self._made_of[_address(tensor)] = pieces

    def _joined(self, tensors: Sequence[Tensor], turns: int) -> list[_Piece] | None:
        """Of each tensor in turn an equal part, ``turns`` times over."""
        found = [self.pieces_of(tensor) for tensor in tensors]
        if turns * len(found) > MOST_PIECES or not turns:
            return None
        joined: list[_Piece] = []
        for turn in range(turns):
            for tensor, pieces in zip(tensors, found, strict=True):
                if pieces is None:
                    return None
                part = tensor.numel() // turns
                joined += _cut(pieces, turn * part, part)
        return joined


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _cut(pieces: Iterable[_Piece], start: int, count: int) -> list[_Piece]:
    """The numbers from ``start`` on."""
    found = []
    for name, first, length in pieces:
        begin, end = max(start, 0), min(start + count, length)
        if begin < end:
            found.append((name, first + begin, end - begin))
        start -= length
    return found


def _runs(pieces: Iterable[_Piece], infos: Mapping[str, TensorInfo]) -> Iterator[Run]:
    """The bytes of the pieces, neighbours as one."""
    last: Run | None = None
    for name, first, count in pieces:
        info = infos[name]
        size = DTYPES[info.dtype].itemsize
        run = Run(info.file, info.offset + first * size, count * size)
        if last is not None and (last.file, last.offset + last.nbytes) == (run.file, run.offset):
            last = Run(last.file, last.offset, last.nbytes + run.nbytes)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
