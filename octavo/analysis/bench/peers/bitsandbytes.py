"""bitsandbytes: LLM.int8() (2208.07339), INT8 with the columns of outliers kept in 16 bits."""

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from octavo.analysis.bench.language import engine
from octavo.analysis.bench.linear import Bind
from octavo.analysis.bench.peers import Layers, Models, Peer, Setting
from octavo.analysis.bench.race import Task

THRESHOLD = 6.0
NAME = "bitsandbytes llm-int8"


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    library: Any = import_module("bitsandbytes")
    rows, columns = weight.shape
    made: nn.Module = library.nn.Linear8bitLt(
        columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=THRESHOLD
    )
    made.weight = library.nn.Int8Params(weight.half().contiguous(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made.to("cpu").eval()  # which quantizes


def _layer(weight: Tensor) -> Bind:
    model = _linear(weight, None)
    return lambda x: lambda: model(x)


def _model(setting: Setting) -> dict[str, Task]:
    model: Any = copy.deepcopy(setting.model).to(torch.bfloat16)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _linear(module.weight.data, module.bias))
    return engine(model, setting.prompt)


def _layers(_: int) -> Layers:
    return {NAME: _layer}


def _models() -> Models:
    return {NAME: _model}


PEER = Peer("bitsandbytes", "bitsandbytes", "pip install bitsandbytes", _layers, _models)
