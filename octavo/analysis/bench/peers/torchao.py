"""torchao: PyTorch's own quantization library; dynamic INT8 and INT8 weights, eager and compiled."""

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from octavo.analysis.bench.language import engine
from octavo.analysis.bench.linear import COMPILED, Bind
from octavo.analysis.bench.peers import Layers, Models, Peer, Setting
from octavo.analysis.bench.race import Task

CONFIGS = {"int8-dynamic": "Int8DynamicActivationInt8WeightConfig", "int8-weight-only": "Int8WeightOnlyConfig"}


def _quantized(model: nn.Module, config: str) -> nn.Module:
    """In place: all linear layers but the output head, as Octavo does it."""
    api: Any = import_module("torchao.quantization")
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    api.quantize_(model, getattr(api, config)(), lambda m, _: isinstance(m, nn.Linear) and m is not head)
    return model


def _layer(config: str, compiled: bool, weight: Tensor) -> Bind:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model = _quantized(nn.Sequential(linear), config)
    run = torch.compile(model, dynamic=False) if compiled else model
    return lambda x: lambda: run(x)


def _model(config: str, compiled: bool, setting: Setting) -> dict[str, Task]:
    model = copy.deepcopy(setting.model).to(torch.bfloat16)
    return engine(_quantized(model, config), setting.prompt, compiled)


def _ways(make: Callable[[str, bool, Any], Any]) -> dict[str, Callable[[Any], Any]]:
    return {
        f"torchao {name}{COMPILED if fast else ''}": partial(make, config, fast)
        for name, config in CONFIGS.items()
        for fast in (False, True)
    }


def _layers(_: int) -> Layers:
    return _ways(_layer)


def _models() -> Models:
    return _ways(_model)


PEER = Peer("torchao", "torchao", "pip install torchao", _layers, _models)
