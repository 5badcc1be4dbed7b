"""Static scales of keys and values in checkpoints.

compressed-tensors tells in ``kv_cache_scheme`` how the keys and values of all attention modules are cast, and keeps
``k_scale`` and ``v_scale`` beside their projections: [1], or [heads, 1, 1] for a scale a head. Octavo's own layout
keeps the tensors of ``KVScales`` under their own names, and the Casts in its manifest.

What is loaded is used by ``octavo.KVCache(model)``; called without one, a model keeps its cache in its own dtype.
"""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from octavo.core.cast import Cast
from octavo.core.formats import IntegerFormat
from octavo.core.granularity import PerChannel, PerTensor, scale_shape
from octavo.core.records import from_json, to_json
from octavo.core.scaling import Static
from octavo.errors import OctavoError, OctavoWarning
from octavo.io import compressed_tensors
from octavo.io.safe_files import brief
from octavo.nn.kv_scales import NAMES, KVScales, Part
from octavo.nn.token_store import check

ATTRIBUTE = "kv_scales"
A_HEAD = PerChannel(1)
PROBE = (2, 3, 5, 7)  # batch, heads, tokens, dim: no two alike


@dataclass(frozen=True)
class Stored:
    """The scales of one attention module in a file: what they are for, and the names of their tensors by attribute."""

    part: Part
    index: int
    keys: Cast | None
    values: Cast | None
    tensors: dict[str, str]


def found_in(model: nn.Module) -> dict[str, KVScales]:
    """The calibrated attention modules by name, and what they were calibrated to."""
    scales = {name: m for name, m in model.named_modules() if isinstance(m, KVScales)}
    return {name.rpartition(".")[0]: m for name, m in scales.items()}


def obstacle(found: Mapping[str, KVScales], model: nn.Module) -> str | None:
    """Why compressed-tensors cannot hold these scales of the model, or None."""
    for name, scales in found.items():
        how = scales.keys
        if scales.part != "self":
            return f"{name}: the layout has scales for one cache, not for that of cross-attention"
        if how is None or how != scales.values or how != next(iter(found.values())).keys:
            return f"{name}: the layout casts all keys and values of a model alike"
        if how.format not in compressed_tensors.TYPES or how.affine or how.rounding != "nearest-even":
            return f"{name}: the layout has symmetric caches in INT8 or E4M3FN, rounded to the nearest, not {how}"
        if not isinstance(how.scale, Static) or how.granularity not in (PerTensor(), A_HEAD):
            return f"{name}: the layout has caches with static scales, one a tensor or one a head, not {how}"
    text: Any = getattr(getattr(model, "config", None), "get_text_config", None)
    if found and text is not None and not hasattr(text(decoder=True), "num_key_value_heads"):
        return f"{next(iter(found))}: the layout's library must read num_key_value_heads in config.json, which has none"
    return None


def public_scheme(found: Mapping[str, KVScales]) -> dict[str, Any] | None:
    """The ``kv_cache_scheme`` of these scales, or None where there are none."""
    how = next((scales.keys for scales in found.values()), None)
    if how is None:
        return None
    kind = compressed_tensors.TYPES[how.format]
    strategy = "attn_head" if how.granularity == A_HEAD else "tensor"
    return {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False, "strategy": strategy}


def public_tensors(found: Mapping[str, KVScales], dtype: torch.dtype) -> dict[str, Tensor]:
    """The scales as compressed-tensors names and stores them, in the model's dtype where that holds them."""
    content = {}
    for name, scales in found.items():
        for part, how in (("k_scale", scales.keys), ("v_scale", scales.values)):
            assert how is not None
            scale = getattr(scales, part).reshape((-1, 1, 1) if how.granularity == A_HEAD else (1,))
            content[f"{name}.{part}"] = compressed_tensors.short(scale, dtype)
    return content


def public_plan(told: Mapping[str, Any], names: Collection[str], model: nn.Module, where: str) -> dict[str, Stored]:
    """The scales that a ``quantization_config`` speaks of, by attention module. Raises where they are not there."""
    cast = told.get("kv_cache_scheme")
    if cast is None:
        return {}
    if isinstance(cast, dict) and cast.get("dynamic") is True:
        warnings.warn(
            f"{where}: its kv_cache_scheme is dynamic, which octavo.KVCache(model, keys=…) can be; nothing is set",
            OctavoWarning,
            stacklevel=4,
        )
        return {}
    try:
        a_head = cast["strategy"] == "attn_head"
        how = compressed_tensors.input_cast({**cast, "strategy": "tensor"} if a_head else cast)
        if how.affine:
            raise OctavoError("a cache with zero points")
    except (KeyError, TypeError, AttributeError, OctavoError) as error:
        raise OctavoError(f"{where}: kv_cache_scheme is not one Octavo can run: {brief(error)}") from error
    how = Cast(how.format, A_HEAD if a_head else PerTensor(), Static())
    ends = (".k_scale", ".v_scale")
    owners = [name for name, _ in model.named_modules() if any(name + end in names for end in ends)]
    if not owners or any(name + end not in names for name in owners for end in ends):
        raise OctavoError(
            f"{where} has a kv_cache_scheme, but the files lack k_scale and v_scale for {owners or 'all'}"
        )
    plan = {}
    for position, name in enumerate(owners):
        index = getattr(model.get_submodule(name), "layer_idx", None)
        parts = {part: f"{name}.{part}" for part in ("k_scale", "v_scale")}
        plan[name] = Stored("self", index if isinstance(index, int) else position, how, how, parts)
    return plan


def own_record(found: Mapping[str, KVScales]) -> dict[str, Any]:
    """The scales' part of the manifest."""
    return {
        name: {"part": x.part, "index": x.index, "keys": to_json(x.keys), "values": to_json(x.values)}
        for name, x in found.items()
    }


def own_tensors(found: Mapping[str, KVScales]) -> dict[str, Tensor]:
    """The scales' tensors, under their own names."""
    tensors = {f"{name}.{ATTRIBUTE}.{part}": getattr(x, part) for name, x in found.items() for part in NAMES}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def own_plan(told: Any, names: Collection[str], model: nn.Module, where: str) -> dict[str, Stored]:
    """The scales that a manifest speaks of, by attention module. Raises where they are not there."""
    modules, plan = dict(model.named_modules()), {}
    try:
        for name, content in told.items():
            keys, values = from_json(content["keys"]), from_json(content["values"])
            for side, how in (("keys", keys), ("values", values)):
                if how is not None:
                    if not isinstance(how, Cast):
                        raise OctavoError(f"{side} are cast by a {type(how).__name__}")
                    check(side, how)
            if name not in modules or content["part"] not in get_args(Part) or not _is_index(content["index"]):
                raise OctavoError(f"there is no cache {content['part']!r} {content['index']!r} of {name!r}")
            parts = {part: f"{name}.{ATTRIBUTE}.{part}" for part in _parts(keys, values)}
            if missing := [tensor for tensor in parts.values() if tensor not in names]:
                raise OctavoError(f"the files lack {missing[0]}")
            plan[name] = Stored(content["part"], content["index"], keys, values, parts)
    except (KeyError, TypeError, AttributeError, OctavoError) as error:
        raise OctavoError(f"{where}: kv_cache is damaged: {brief(error)}") from error
    return plan


def attach(model: nn.Module, plan: Mapping[str, Stored], tensors: Mapping[str, Tensor]) -> None:
    """Put the scales onto their attention modules. Raises ``OctavoError`` for tensors that cannot be their scales."""
    for name, stored in plan.items():
        found: dict[str, Tensor] = {}
        for attribute, tensor in stored.tensors.items():
            how = stored.keys if attribute.startswith("k_") else stored.values
            assert how is not None
            found[attribute] = _checked(tensor, tensors[tensor], how)
        k, v = ((found.get(f"{x}_scale"), found.get(f"{x}_zero_point")) for x in "kv")
        scales = KVScales(stored.part, stored.index, stored.keys, stored.values, k, v)
        model.get_submodule(name).add_module(ATTRIBUTE, scales)


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _parts(keys: Cast | None, values: Cast | None) -> list[str]:
    """The tensors that Casts need."""
    static = [(x, how) for x, how in (("k", keys), ("v", values)) if how is not None and isinstance(how.scale, Static)]
    return [f"{x}_{part}" for x, how in static for part in ("scale", "zero_point")[: 1 + how.affine]]


def _checked(name: str, tensor: Tensor, how: Cast) -> Tensor:
    """A stored scale or zero point as [1, heads, 1, dim], with 1 wherever the granularity does not tell apart."""
    counts = scale_shape(PROBE, how.granularity.block(PROBE))
    least = 3 if tensor.ndim == 3 else 4  # compressed-tensors leaves the batch out
    shape = tuple(tensor.shape) if tensor.numel() != 1 else (1,) * least
    fits = len(shape) == least and all(c > 1 or n == 1 for c, n in zip(counts[4 - least :], shape, strict=True))
    if name.endswith("zero_point"):
        fmt = how.format
        fits &= tensor.dtype == torch.int32 and isinstance(fmt, IntegerFormat)
        sound = fits and isinstance(fmt, IntegerFormat) and bool(((tensor >= fmt.low) & (tensor <= fmt.high)).all())
    else:
        fits &= tensor.dtype in compressed_tensors.FLOATS
        sound = fits and bool((tensor.isfinite() & (tensor > 0)).all())
    if not sound or tensor.numel() == 0:
        raise OctavoError(
            f"{name} is no {'scale' if fits else 'tensor'} for {how}: {tensor.dtype} {list(tensor.shape)}"
            f"{f' from {float(tensor.min()):g}' if fits and tensor.numel() else ''}; the checkpoint is damaged"
        )
    return (tensor if name.endswith("zero_point") else tensor.float()).reshape((1,) * (4 - least) + shape)
