"""OpenVINO: a MatMul with compressed INT8 weights, whose CPU plugin also quantizes inputs in groups, as for LLMs."""

from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from octavo.analysis.bench.linear import Bind
from octavo.analysis.bench.peers import Layers, Peer

#: The name of a way, and the size of the groups in which the plugin quantizes inputs (0: not at all).
WAYS = {"openvino int8-dynamic": 64, "openvino int8-weight-only": 0}


def _layer(threads: int, group: int, weight: Tensor) -> Bind:
    library: Any = import_module("openvino")
    ops: Any = import_module("openvino.opset13")
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    codes = (weight.float() / scale).round().char()
    x = ops.parameter([-1, weight.shape[1]], library.Type.f32)
    floats = ops.convert(ops.constant(codes.numpy(), library.Type.i8), "f32")
    weights = ops.multiply(floats, ops.constant(scale.numpy(), library.Type.f32))
    model = library.Model([ops.matmul(x, weights, False, True)], [x], "linear")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        "ENABLE_CPU_PINNING": False,  # it would pin our threads too
    }
    compiled = library.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def bind(given: Tensor) -> Any:
        numbers = given.float().numpy()
        return lambda: request.infer([numbers], share_inputs=True, share_outputs=True)

    return bind


def _layers(threads: int) -> Layers:
    return {name: partial(_layer, threads, group) for name, group in WAYS.items()}


PEER = Peer("openvino", "openvino", "pip install openvino", _layers)
