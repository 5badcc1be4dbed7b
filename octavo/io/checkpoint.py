"""Save a quantized model as a folder that engines load, and load it back with bit-identical results.

Two layouts. ``compressed-tensors`` is what vLLM and transformers read; it knows INT8 and E4M3FN. ``octavo`` holds
every scheme: codes and scales under their own names in ``octavo.safetensors``, and the schemes in ``octavo.json``. The
file is so named that an engine which cannot read it finds no weights, instead of starting from random ones.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from octavo.core.formats import IntegerFormat
from octavo.core.granularity import scale_shape
from octavo.core.qtensor import QTensor
from octavo.core.records import from_json, to_json
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.io import compressed_tensors, huggingface, integer, kv_cache, loading, safe_files, structure
from octavo.io.folder import atomic_folder, did_you_mean
from octavo.io.safe_files import TensorInfo
from octavo.nn import swap
from octavo.nn.integer.model import IntegerModel
from octavo.nn.layer import QuantizedLayer
from octavo.nn.linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUTS = ("compressed-tensors", "octavo")
CONFIG = "config.json"
MANIFEST = "octavo.json"
VERSION = 1
SHARD = "5GB"
OPTIONAL = ("zero_point", "input_scale", "input_zero_point")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def layout_for(model: nn.Module) -> tuple[str, str]:
    """The layout that most engines read and that can hold this model, and why it is not compressed-tensors, if not."""
    for name, layer in _quantized(model).items():
        if not isinstance(layer, QuantizedLinear):
            return "octavo", f"{name}: the layout has linear layers, not {type(layer).__name__}"
        why = compressed_tensors.obstacle(layer.scheme, layer.in_features, layer.transposed)
        if why is not None:
            return "octavo", f"{name}: {why}"
    if (why := kv_cache.obstacle(kv_cache.found_in(model), model)) is not None:
        return "octavo", why
    if not is_transformers(model):
        return "octavo", f"{type(model).__name__} is not a transformers model"
    return "compressed-tensors", ""


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    layout: str = "compressed-tensors",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    force: bool = False,
) -> None:
    """Write a quantized model (and its tokenizer) as a checkpoint folder, whole or not at all.

    Raises ``OctavoError`` if nothing is quantized, if a layer cannot be said in the layout, or if ``folder`` is not
    empty and ``force`` is not given.
    """
    told = contents(model, layout)
    with atomic_folder(folder, force) as unfinished:
        write_description(model, told, unfinished, tokenizer)
        _write_tensors(model, told.tensors, unfinished, told.file)


@dataclass(frozen=True)
class Contents:
    """What a folder will hold: its layout, its tensors by name, and how ``config.json`` says they are quantized."""

    layout: str
    tensors: dict[str, Tensor]
    method: dict[str, Any]

    @property
    def file(self) -> str:
        """The file of the tensors, if they are not too many for one."""
        return safe_files.OWN if self.layout == "octavo" else safe_files.WEIGHTS


def contents(model: nn.Module, layout: str) -> Contents:
    """What ``save`` writes for a model, which may be on the meta device: then names, shapes and dtypes are right.

    A float tensor that transformers ties to another one is left out. Raises what ``save`` raises of the model.
    """
    if layout not in LAYOUTS:
        raise OctavoError(f"layout is {' or '.join(LAYOUTS)}, not {layout!r}")
    layers = _quantized(model)
    if not layers:
        how = "save it with octavo.save_integer" if isinstance(model, IntegerModel) else "call octavo.quantize_ first"
        raise OctavoError(f"the model has no 8-bit layer; {how}")
    possible, why = layout_for(model)
    if layout == "compressed-tensors" and possible != layout:
        raise OctavoError(f"compressed-tensors cannot hold this model: {why}. Save it with layout='octavo'")
    caches = kv_cache.found_in(model)
    if layout == "octavo":
        state = {**model.state_dict(), **kv_cache.own_tensors(caches)}
        method: dict[str, Any] = {"quant_method": "octavo", "note": "open with octavo.load"}
    else:
        state = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in layers}
        linears = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLinear)}
        for name, layer in linears.items():
            state |= compressed_tensors.tensors(name, layer)
        state |= kv_cache.public_tensors(caches, next(iter(layers.values())).dtype)
        method = compressed_tensors.config(linears, model) | {"kv_cache_scheme": kv_cache.public_scheme(caches)}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name for name, tensor in state.items() if _same_numbers(state.get(ties.get(name, "")), tensor)}
    return Contents(layout, {name: tensor for name, tensor in state.items() if name not in tied}, method)


def write_description(
    model: nn.Module, told: Contents, folder: Path, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> None:
    """Everything of the folder but the tensors: config, manifest, tokenizer."""
    layers = _quantized(model)
    if is_transformers(model):
        _write_config(model, layers, folder, told.method)
    manifest = {
        "version": VERSION,
        "layout": told.layout,
        "buffers": _unsaved_buffers(model),
        "layers": {
            name: {"scheme": to_json(x.scheme), "dtype": str(x.dtype).removeprefix("torch.")}
            for name, x in layers.items()
        },
        "kv_cache": kv_cache.own_record(kv_cache.found_in(model)),
        "structure": structure.record(model),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class _Stored:
    """One 8-bit layer of a folder: its scheme, the model's dtype, how it is laid out, the tensors it is stored in."""

    scheme: Scheme
    dtype: torch.dtype
    native: bool
    parts: list[str]


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Open a folder that ``save`` or ``save_integer`` wrote, or any 8-bit compressed-tensors checkpoint, for inference.

    ``model``: for a model that is not transformers', the same architecture in float; its layers are replaced in
    place. Raises ``OctavoError`` on a damaged file, a missing or left-over tensor, or a scheme it does not know.
    """
    path = Path(folder)
    if not path.is_dir():
        raise OctavoError(f"{path}: no such folder.{did_you_mean(path)}")
    config = safe_files.read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    infos = safe_files.tensors(path)
    manifest = safe_files.read_json(path / MANIFEST) if (path / MANIFEST).exists() else {}
    if manifest.get("layout") == integer.LAYOUT:
        return integer.load_integer(path)
    plan: Callable[[nn.Module], dict[str, _Stored]]
    plan_cache: Callable[[nn.Module], dict[str, kv_cache.Stored]]
    if manifest.get("layout") == "octavo":
        plan = partial(_plan_native, path, manifest, infos)
        plan_cache = partial(kv_cache.own_plan, manifest.get("kv_cache", {}), infos, where=str(path / MANIFEST))
    elif _method(config) == compressed_tensors.METHOD:
        plan = partial(_plan_compressed, path, config)
        plan_cache = partial(kv_cache.public_plan, config["quantization_config"], infos, where=str(path / CONFIG))
    else:
        raise OctavoError(
            f"{path} is {_method(config) or 'not quantized'}; octavo.load opens compressed-tensors and octavo "
            "checkpoints. Quantize a float checkpoint with octavo.quantize_"
        )
    if model is None:
        model_class, settings = huggingface.architecture(path, config)
        _check_depth(path, config, len(infos))
        with torch.device("meta"), loading.transformers_on(path / CONFIG):
            shapes = model_class(settings)
        stored, caches = _check_plan(path, plan(shapes), shapes, infos), plan_cache(shapes)
        changes = structure.plan(manifest.get("structure", {}), infos, shapes, str(path / MANIFEST))
        tensors = dict(safe_files.read(path, *infos))
        floats = _floats(tensors, stored, caches) | structure.placeholders(changes, shapes)
        for name in changes.biases:
            del floats[f"{name}.bias"]
        model = _transformers_model(path, model_class, settings, stored, shapes, floats, infos)
        structure.apply(changes, model, tensors)
    else:
        stored, caches = _check_plan(path, plan(model), model, infos), plan_cache(model)
        changes = structure.plan(manifest.get("structure", {}), infos, model, str(path / MANIFEST))
        tensors = dict(safe_files.read(path, *infos))
        structure.apply(changes, model, tensors)
        _load_floats(path, model, stored, _floats(tensors, stored, caches))
    layers = {name: layer for layer in swap.layers(model) for name in layer.names}
    for name, entry in stored.items():
        layer = layers[name]
        pieces = {part.rpartition(".")[2]: tensors[part] for part in entry.parts}
        build = _native_weight if entry.native else compressed_tensors.weight
        rows, cols = layer.matrix.shape
        weight = build(name, pieces, entry.scheme, (rows, cols), entry.dtype)
        calibrated = _input_scales(name, pieces, entry)
        swap.replace(model, layer, layer.eight_bit.replacing(layer.module, weight, entry.scheme, **calibrated))
    structure.clamp(changes, model)
    kv_cache.attach(model, caches, tensors)
    _restore_dtypes(model, tensors)
    _restore_buffers(model, manifest.get("buffers"))
    return model.eval()


def _check_depth(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """A config that asks for a billion layers would keep even an empty model building for ever."""
    for key, value in config.items():
        if "layer" in key and isinstance(value, int) and value > max(loading.MAX_LAYERS, tensors):
            raise OctavoError(f"{path / CONFIG}: {key} is {value}, but the folder has {tensors} tensors")


def _plan_native(
    path: Path, manifest: Mapping[str, Any], infos: Mapping[str, TensorInfo], model: nn.Module
) -> dict[str, _Stored]:
    stored = {}
    try:
        if manifest["version"] != VERSION:
            raise OctavoError(f"it is of version {manifest['version']}, this is Octavo for version {VERSION}")
        for name, told in manifest["layers"].items():
            scheme, dtype = from_json(told["scheme"]), DTYPES[told["dtype"]]
            if not isinstance(scheme, Scheme):
                raise OctavoError(f"layer {name!r} has no scheme")
            optional = [f"{name}.{part}" for part in OPTIONAL if f"{name}.{part}" in infos]
            stored[name] = _Stored(scheme, dtype, True, [f"{name}.codes", f"{name}.scale", *optional])
    except (KeyError, TypeError, AttributeError, OctavoError) as error:
        raise OctavoError(f"{path / MANIFEST} is damaged: {safe_files.brief(error)}") from error
    return stored


def _plan_compressed(path: Path, config: Mapping[str, Any], model: nn.Module) -> dict[str, _Stored]:
    found = [x for x in swap.layers(model) if x.obstacle is None]
    linears = {n: x.module for x in found if isinstance(x.module, nn.Linear) for n in x.names}
    schemes = compressed_tensors.parse(config["quantization_config"], linears, str(path / CONFIG))
    dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    return {n: _Stored(s, dtype, False, compressed_tensors.stored_names(n, s)) for n, s in schemes.items()}


def _check_plan(
    path: Path, stored: dict[str, _Stored], model: nn.Module, infos: Mapping[str, TensorInfo]
) -> dict[str, _Stored]:
    layers = {name for layer in swap.layers(model) if layer.obstacle is None for name in layer.names}
    unknown = [name for name in stored if name not in layers]
    if unknown or not stored:
        raise OctavoError(f"{path}: {type(model).__name__} has no layer {safe_files.listed(unknown)}")
    missing = [part for entry in stored.values() for part in entry.parts if part not in infos]
    if missing:
        raise OctavoError(
            f"{path} lacks {len(missing)} tensors: {safe_files.listed(missing)}. Save or download it again"
        )
    return stored


def _floats(
    tensors: Mapping[str, Tensor], stored: Mapping[str, _Stored], caches: Mapping[str, kv_cache.Stored]
) -> dict[str, Tensor]:
    """The tensors that the float model has too."""
    ours = {part for entry in stored.values() for part in entry.parts}
    ours |= {part for cache in caches.values() for part in cache.tensors.values()}
    return {name: tensor for name, tensor in tensors.items() if name not in ours}


def _transformers_model(
    path: Path,
    model_class: Any,
    settings: Any,
    stored: Mapping[str, _Stored],
    shapes: nn.Module,
    state: dict[str, Tensor],
    infos: Mapping[str, TensorInfo],
) -> nn.Module:
    """The model with its float tensors loaded; where codes will go stand weights of one number, spread out."""
    dtype = next(iter(stored.values())).dtype
    for name in stored:
        for part, tensor in shapes.get_submodule(name).state_dict(prefix=f"{name}.").items():
            if _of_weight(part) == name:
                state[part] = torch.ones(1, dtype=dtype).expand(tensor.shape)
    told = _unpacked(infos)
    model: nn.Module = loading.load(
        path, model_class, settings, told, pretrained_model_name_or_path=None, state_dict=state, dtype="auto"
    )
    return model


def _of_weight(part: str) -> str | None:
    """The layer whose weight this tensor is, or is computed from (weight norm); None for its other tensors."""
    name, computed, _ = part.partition(".parametrizations.weight.")
    if computed:
        return name
    return part.removesuffix(".weight") if part.endswith(".weight") else None


def _unpacked(infos: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """The headers as if every word of four weights were four numbers, which is what they count for."""
    return [
        replace(info, shape=(*info.shape[:-1], 4 * info.shape[-1])) if name.endswith(".weight_packed") else info
        for name, info in infos.items()
    ]


def _load_floats(path: Path, model: nn.Module, stored: Mapping[str, _Stored], state: Mapping[str, Tensor]) -> None:
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise OctavoError(f"{path} does not fit {type(model).__name__}: {safe_files.brief(error)}") from error
    lost = [name for name in missing if _of_weight(name) not in stored]
    if lost or unexpected:
        raise OctavoError(
            f"{path} does not fit {type(model).__name__}: it lacks {safe_files.listed(lost) or 'nothing'}, and has no "
            f"place for {safe_files.listed(list(unexpected)) or 'nothing'}"
        )


def _native_weight(
    name: str, pieces: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> QTensor:
    try:
        block = scheme.weight.granularity.block(shape)
    except OctavoError as error:
        raise OctavoError(f"{name}: {error}") from error
    counts = scale_shape(shape, block)
    expected = {
        "codes": (scheme.weight.format.code_dtype, shape),
        "scale": (torch.float32, counts),
        "zero_point": (torch.int32, counts),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int32, (1,)),
    }
    for part, tensor in pieces.items():
        if (tensor.dtype, tuple(tensor.shape)) != expected[part]:
            raise OctavoError(
                f"{name}.{part} is {tensor.dtype} {list(tensor.shape)}, its scheme says {expected[part][0]} "
                f"{list(expected[part][1])}: the checkpoint is damaged"
            )
    fmt, codes = scheme.weight.format, pieces["codes"]
    low, high = (fmt.low, fmt.high) if isinstance(fmt, IntegerFormat) else (0, 2**fmt.bits - 1)
    if fmt.bits < 8 and codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise OctavoError(f"{name}.codes holds codes that {fmt.name} does not have: the checkpoint is damaged")
    if not bool(pieces["scale"].isfinite().all()):
        raise OctavoError(f"{name}.scale holds NaN or Inf: the checkpoint is damaged")
    if scheme.weight.affine != ("zero_point" in pieces):
        raise OctavoError(f"{name} {'lacks' if scheme.weight.affine else 'should not have'} a zero_point")
    return QTensor(pieces["codes"], pieces["scale"], pieces.get("zero_point"), scheme.weight.format, block, dtype)


def _input_scales(name: str, pieces: Mapping[str, Tensor], entry: _Stored) -> dict[str, Tensor]:
    """The calibrated scale of a layer's input, if its scheme has one. Raises where they do not fit each other."""
    found = {part: pieces[part] for part in ("input_scale", "input_zero_point") if part in pieces}
    how = entry.scheme.input if entry.scheme.static else None
    if ("input_scale" in found, "input_zero_point" in found) != (how is not None, how is not None and how.affine):
        raise OctavoError(f"{name} has {' and '.join(found) or 'no input_scale'}, which does not go with its scheme")
    if how is None:
        return {}
    if not entry.native:
        found = compressed_tensors.input_scales(name, found)
    scale, zero_point = float(found["input_scale"]), int(found.get("input_zero_point", 0))
    if not 0 < scale < float("inf"):
        raise OctavoError(f"{name}.input_scale is {scale}: the checkpoint is damaged")
    if how.affine and isinstance(how.format, IntegerFormat) and not how.format.low <= zero_point <= how.format.high:
        raise OctavoError(f"{name}.input_zero_point is {zero_point}, no number of {how.format.name}: it is damaged")
    return found


def _unsaved_buffers(model: nn.Module) -> dict[str, str]:
    """Dtypes of float buffers that no checkpoint holds, because transformers recomputes them (rotary frequencies).

    It does so in float32; a model that was converted to bfloat16 had them rounded, and its logits show it.
    """
    saved = set(model.state_dict())
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point() and f".{kv_cache.ATTRIBUTE}." not in name
    }


def _restore_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Each float tensor in the dtype it was saved in: a model may keep its norms in float32 and the rest not."""
    for name, own in model.named_parameters():
        stored = tensors.get(name)
        if stored is not None and own.is_floating_point() and stored.shape == own.shape and stored.dtype != own.dtype:
            own.data = stored.to(own.device)


def _restore_buffers(model: nn.Module, dtypes: Any) -> None:
    unsaved = _unsaved_buffers(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in unsaved}
    for name, dtype in dtypes.items() if isinstance(dtypes, dict) else ():
        if name in buffers and isinstance(dtype, str) and dtype in DTYPES:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, buffers[name].to(DTYPES[dtype]))


def _quantized(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLayer)}


def is_transformers(model: nn.Module) -> bool:
    """Whether transformers can write the model's config, so that it can be opened without its code."""
    return hasattr(getattr(model, "config", None), "save_pretrained")


def _method(config: Mapping[str, Any]) -> str | None:
    told = config.get("quantization_config")
    return str(told.get("quant_method")) if isinstance(told, dict) else None


def _write_config(model: Any, layers: Mapping[str, QuantizedLayer], folder: Path, method: dict[str, Any]) -> None:
    settings = model.config
    settings.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    content = json.loads((folder / CONFIG).read_text())
    content["architectures"] = [type(model).__name__]
    content["dtype"] = str(next(iter(layers.values())).dtype).removeprefix("torch.")
    content["quantization_config"] = method
    if content.get("tie_word_embeddings") and _untied(model):
        untied = {"tie_word_embeddings": False}
        if not type(settings).from_dict(settings.to_dict() | untied).tie_word_embeddings:  # T5's would not obey
            content |= untied
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _untied(model: Any) -> bool:
    """Whether a tensor that the model's class ties to another has numbers of its own now, or became codes."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    own = dict(model.named_parameters(remove_duplicate=False))
    return any(target not in own or own[target] is not own.get(source) for target, source in ties.items())


def _same_numbers(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors begin at the same place of the same memory; those on the meta device have places too."""
    if one is None:
        return False
    places = [(x.untyped_storage()._cdata, x.storage_offset()) for x in (one, other)]
    return places[0] == places[1]


def _write_tensors(model: nn.Module, state: Mapping[str, Tensor], folder: Path, file: str) -> None:
    """Shards of at most ``SHARD``."""
    seen: set[int] = set()
    content = {}
    for name, tensor in state.items():
        # every name its own bytes: safetensors refuses tensors that share memory
        storage = tensor.untyped_storage().data_ptr()
        content[name] = (tensor.clone() if storage in seen else tensor).contiguous()
        seen.add(storage)
    if is_transformers(model):
        pattern = file.replace(".safetensors", "{suffix}.safetensors")
        hub = loading.require("huggingface_hub")
        hub.save_torch_state_dict(
            content, folder, filename_pattern=pattern, max_shard_size=SHARD, metadata={"format": "pt"}
        )
    else:
        from safetensors.torch import save_file

        save_file(content, folder / file, metadata={"format": "pt"})
