"""What folding and fusing changed about a model's modules, kept beside its numbers.

Where a BatchNorm went into the weights before it, or a ReLU into the 8-bit layer before it, the saved model has an
``nn.Identity``; the architecture that the folder is loaded into has them still, and may have no bias where folding made
one. The manifest says what to change there. No module is replaced that any tensor of the folder belongs to.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import OctavoError
from octavo.io.safe_files import TensorInfo, brief
from octavo.nn import swap
from octavo.nn.layer import QuantizedLayer


@dataclass(frozen=True)
class Changes:
    """Modules to replace by identities, layers that get the bias of the folder, and the ranges of results by layer."""

    identities: list[str]
    biases: list[str]
    clamps: dict[str, tuple[float, float]]


def record(model: nn.Module) -> dict[str, Any]:
    """The manifest's part. JSON has no infinities; None stands for them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    clamps = {n: m.clamp for n, m in modules.items() if isinstance(m, QuantizedLayer) and m.clamp is not None}
    return {
        "identities": [name for name, module in modules.items() if type(module) is nn.Identity],
        "clamps": {name: [edge if math.isfinite(edge) else None for edge in ends] for name, ends in clamps.items()},
    }


def plan(told: Any, infos: Mapping[str, TensorInfo], model: nn.Module, where: str) -> Changes:
    """What of a manifest's part is to be done to a model that is about to be filled. Raises where it does not fit."""
    modules = dict(model.named_modules(remove_duplicate=False))
    try:
        identities = [name for name in told.get("identities", []) if type(modules[name]) is not nn.Identity]
        clamps = {name: _ends(*ends) for name, ends in told.get("clamps", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OctavoError(f"{where}: structure is damaged, or of another architecture: {brief(error)}") from error
    for name in identities:
        if not name or any(tensor.startswith(f"{name}.") for tensor in infos):
            raise OctavoError(f"{where}: structure is damaged: {name!r} has tensors and cannot be an identity")
    biases = [
        name
        for name, module in modules.items()
        if identities and getattr(module, "bias", 0) is None and (info := infos.get(f"{name}.bias")) is not None
        if list(info.shape) == [getattr(module, "out_channels", getattr(module, "out_features", None))]
    ]
    return Changes(identities, biases, clamps)


def placeholders(changes: Changes, model: nn.Module) -> dict[str, Tensor]:
    """Numbers for the tensors of modules that will be identities, to satisfy whoever builds the model first."""
    return {
        part: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name in changes.identities
        for part, tensor in model.get_submodule(name).state_dict(prefix=f"{name}.").items()
    }


def apply(changes: Changes, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Change the float model."""
    names: dict[nn.Module, list[str]] = {}
    for name in changes.identities:
        names.setdefault(model.get_submodule(name), []).append(name)
    for module, known_as in names.items():
        swap.replace(model, swap.Layer(tuple(known_as), module, None), nn.Identity())
    for name in changes.biases:
        model.get_submodule(name).bias = nn.Parameter(tensors[f"{name}.bias"])


def clamp(changes: Changes, model: nn.Module) -> None:
    """Let 8-bit layers hold their results to the ranges that they have taken over."""
    for name, ends in changes.clamps.items():
        layer = dict(model.named_modules(remove_duplicate=False)).get(name)
        if not isinstance(layer, QuantizedLayer):
            raise OctavoError(f"structure is damaged: {name!r} is no 8-bit layer and has no range")
        layer.clamp = ends


def _ends(low: float | None, high: float | None) -> tuple[float, float]:
    ends = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    if not ends[0] <= ends[1]:
        raise ValueError(f"a range from {low} to {high}")
    return ends
