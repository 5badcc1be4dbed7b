"""The law of safetensors, checked before anything is loaded.

A safetensors file is an 8-byte length, a JSON header of that length, and the tensors' bytes laid end to end. Only the
header is read here, never more than the file really holds, and every promise it makes is compared with the file: a
download that was cut off, or a header written to do harm, becomes an error that names the file and the tensor.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import torch

from octavo.errors import OctavoError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN = "octavo.safetensors"  # of a layout that only Octavo reads, so named that nothing else tries
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 64  # the limit of torch
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_AGAIN = "Download it again."
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor; ``offset``: where in the file its bytes begin."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0


def tensors(folder: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder, sharded or not; reads and checks the headers only."""
    found: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, info in header(file).items():
            if name in found:
                raise OctavoError(
                    f"{folder}: tensor {show(name)} is in both {found[name].file.name} and {file.name}. {_AGAIN}"
                )
            found[name] = info
    for index in _indices(folder):
        for name, shard in _weight_map(index).items():
            if name not in found or found[name].file != Path(folder) / shard:
                raise OctavoError(f"{index}: tensor {show(name)} is not in {show(shard)}. {_AGAIN}")
    return found


def read(folder: str | os.PathLike[str], *names: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors (all, when none is named), each read when its turn comes, file by file."""
    infos = tensors(folder)
    for name in names:
        if name not in infos:
            near = difflib.get_close_matches(name, infos, n=1)
            raise OctavoError(f"{folder} has no tensor {show(name)}." + (f" Did you mean {near[0]}?" if near else ""))
    wanted = {name: infos[name] for name in (names or infos)}
    return _read(wanted)


def _read(wanted: dict[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    for file in dict.fromkeys(info.file for info in wanted.values()):
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call, unused-ignore]
            for name, info in wanted.items():
                if info.file != file:
                    continue
                try:
                    tensor = opened.get_tensor(name)
                except (SafetensorError, KeyError, RuntimeError, AttributeError) as error:
                    raise OctavoError(
                        f"{file}: torch {torch.__version__} cannot read tensor {show(name)} of dtype {info.dtype} "
                        f"({error}). A newer torch or safetensors may."
                    ) from error
                yield name, tensor


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names; every one exists."""
    folder = Path(folder)
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise OctavoError(f"{folder} cannot be read ({error.strerror}). Name a folder with a checkpoint.") from None
    if any(_DISTRIBUTED.fullmatch(name) for name in names):
        raise OctavoError(f"{folder} is a distributed training checkpoint. Save it whole with save_pretrained first.")
    for whole in (WEIGHTS, OWN):
        if whole in names:
            return [folder / whole]
    for index in _indices(folder):
        shards = sorted(set(_weight_map(index).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise OctavoError(
                f"{folder}: {len(missing)} of {len(shards)} shards are missing: {listed(missing)}. Download them."
            )
        return [folder / shard for shard in shards]
    other = [name for name in names if name.endswith(".safetensors")]
    if other:
        remedy = f"Rename it to {WEIGHTS}." if len(other) == 1 else f"Download {INDEX}, which says how they belong."
        raise OctavoError(f"{folder} holds {listed(other)}, but neither {WEIGHTS} nor {INDEX}. {remedy}")
    raise OctavoError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}. Download the checkpoint's weights.")


def _indices(folder: str | os.PathLike[str]) -> list[Path]:
    """The index of a checkpoint in shards; none where the weights are in one file."""
    return [
        index
        for whole in (WEIGHTS, OWN)
        if (index := Path(folder) / f"{whole}.index.json").is_file() and not (Path(folder) / whole).is_file()
    ]


def header(file: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes, once the whole header has proved true."""
    file = Path(file)
    text, data_bytes = _header_text(file)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{file}: the header is not valid JSON ({brief(error)}). {_AGAIN}") from None
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise OctavoError(f"{file}: the header's __metadata__ is not a map of strings. {_AGAIN}")
    spans = sorted((_span(file, name, entry) for name, entry in entries.items()), key=lambda span: span[:2])
    expected = 0
    for begin, end, name, _ in spans:
        if end > data_bytes:
            raise OctavoError(
                f"{file} is cut off: tensor {show(name)} ends at byte {end} of the data, but the file has only "
                f"{data_bytes}. {_AGAIN}"
            )
        if begin != expected:
            what = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise OctavoError(f"{file}: tensor {show(name)} starts at {begin}, not {expected}, and {what}. {_AGAIN}")
        expected = end
    if expected != data_bytes:
        raise OctavoError(f"{file}: the tensors end at byte {expected} of {data_bytes} bytes of data. {_AGAIN}")
    data = 8 + len(text)
    return {name: replace(info, offset=data + begin) for begin, _, name, info in spans}


def _header_text(file: Path) -> tuple[bytes, int]:
    """The header's bytes, and how many bytes of data follow them."""
    check_regular(file)
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise OctavoError(f"{file} is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`.")
            length = int.from_bytes(start[:8], "little")
            if size < 10 or not 2 <= length <= MAX_HEADER:
                raise OctavoError(
                    f"{file} is not a safetensors file: it has {size} bytes and claims a header of {length} "
                    f"(at most {MAX_HEADER}). {_AGAIN}"
                )
            if 8 + length > size:
                raise OctavoError(
                    f"{file} is cut off: its header ends at byte {8 + length}, but it has only {size}. {_AGAIN}"
                )
            opened.seek(8)
            text = opened.read(length)
    except OSError as error:
        raise OctavoError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None
    if not text.startswith(b"{"):
        raise OctavoError(f"{file} is not a safetensors file: its header does not start with '{{'. {_AGAIN}")
    return text, size - 8 - length


def _span(file: Path, name: str, entry: Any) -> tuple[int, int, str, TensorInfo]:
    """Where one tensor begins and ends, checked against its dtype and shape."""
    where = f"{file}: tensor {show(name)}"
    if not isinstance(entry, dict) or not _encodable(name):
        raise OctavoError(f"{where} has no readable entry in the header. {_AGAIN}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise OctavoError(f"{where} has dtype {show(dtype)}, which is not one of {', '.join(BITS)}. {_AGAIN}")
    if not (_sizes(shape) and len(shape) <= MAX_DIMENSIONS and math.prod(n for n in shape if n) < 2**63):
        raise OctavoError(f"{where} has the impossible shape {show(shape)}. {_AGAIN}")
    if not (_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise OctavoError(f"{where} has the impossible offsets {show(offsets)}. {_AGAIN}")
    begin, end = offsets
    nbytes, spare = divmod(math.prod(shape) * BITS[dtype], 8)
    if spare or end - begin != nbytes:
        raise OctavoError(
            f"{where}: {dtype} of shape {shape} takes {nbytes} bytes, but the header gives it {end - begin}. {_AGAIN}"
        )
    return begin, end, name, TensorInfo(file, dtype, tuple(shape), nbytes)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _encodable(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard, from an index whose shards all lie inside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        raise OctavoError(f'{index} has no "weight_map" from tensors to files. {_AGAIN}')
    for shard in set(weight_map.values()):
        path = PurePosixPath(shard)
        inside = _encodable(shard) and not path.is_absolute() and ".." not in path.parts
        if not inside or path.suffix != ".safetensors" or "\\" in shard or "\0" in shard:
            raise OctavoError(f"{index} names the shard {show(shard)}, which is no safetensors file in this folder.")
    return dict(weight_map)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size, or an error that names the file."""
    check_regular(file)
    try:
        if file.stat().st_size > MAX_HEADER:
            raise OctavoError(f"{file} is larger than {MAX_HEADER} bytes. {_AGAIN}")
        value = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise OctavoError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from None
    except OctavoError:
        raise
    except (ValueError, RecursionError) as error:
        raise OctavoError(f"{file} is not valid JSON ({brief(error)}). {_AGAIN}") from None
    if not isinstance(value, dict):
        raise OctavoError(f"{file} holds a JSON {type(value).__name__}, not an object. {_AGAIN}")
    return value


def check_regular(file: Path) -> None:
    """A pipe or a device would hang whoever opens it."""
    if not file.is_file():
        raise OctavoError(f"{file} is {'not a regular file' if file.exists() else 'missing'}. {_AGAIN}")


def show(value: object, limit: int = 120) -> str:
    """A name from an untrusted file, fit to print: quoted, control characters escaped, never long."""
    text = ascii(value[: 2 * limit]) if isinstance(value, str) else ascii(value)
    return text if len(text) <= limit else text[:limit] + "…"


def listed(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(show(name)[1:-1] for name in names[:limit]) + more


def brief(error: BaseException, limit: int = 300) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "…"
