"""ONNX Runtime: a MatMul that quantizes its input as it comes (DynamicQuantizeLinear, MatMulInteger)."""

from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from octavo.analysis.bench.linear import Bind
from octavo.analysis.bench.peers import Layers, Peer

NAME = "onnxruntime int8-dynamic"


def _bytes(weight: Tensor) -> bytes:
    """An ONNX model: x → uint8 with one scale and zero point → times int8 weights, a scale a channel → float32."""
    onnx: Any = import_module("onnx")
    helper, numpy = onnx.helper, onnx.numpy_helper
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    codes = (weight.float() / scale[:, None]).round().char().T.contiguous()
    constants = [
        numpy.from_array(codes.numpy(), "codes"),
        numpy.from_array(scale.numpy(), "scale"),
    ]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x8", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["x8", "codes", "x_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "x_scale"], ["scales"]),
        helper.make_node("Mul", ["floats", "scales"], ["y"]),
    ]
    float32 = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", float32, ["M", weight.shape[1]])]
    outputs = [helper.make_tensor_value_info("y", float32, ["M", weight.shape[0]])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made: bytes = model.SerializeToString()
    return made


def _layer(threads: int, weight: Tensor) -> Bind:
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would spin in the others' turns
    session = runtime.InferenceSession(_bytes(weight), options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Any:
        told = {"x": x.float().numpy()}
        return lambda: session.run(None, told)

    return bind


def _layers(threads: int) -> Layers:
    return {NAME: partial(_layer, threads)}


PEER = Peer("onnxruntime", "onnxruntime", "pip install onnxruntime onnx", _layers)
