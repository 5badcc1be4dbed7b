"""A linear layer whose weight is 8-bit codes, and whose input may be too.

Stands in for ``torch.nn.Linear`` and for transformers' ``Conv1D`` (GPT-2), whose weight is stored the other way round.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.core.layer import Constants, Plan, plan, scale_of_all
from octavo.core.matmul import full_precision, multiply
from octavo.core.qtensor import QTensor
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError
from octavo.nn.layer import QuantizedLayer
from octavo.nn.outliers import may_hold, multiply_apart


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' linear layer with a weight [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class QuantizedLinear(QuantizedLayer):
    """``y = x Wᵀ + b`` with W [out, in] as codes and scales, and x […, in] cast as the scheme says.

    ``transposed`` remembers that the layer it replaced held its weight as [in, out].
    """

    def __init__(
        self, weight: QTensor, bias: Tensor | None, scheme: Scheme, transposed: bool = False, **calibrated: Any
    ) -> None:
        super().__init__(weight, bias, scheme, **calibrated)
        self.transposed = transposed
        self.out_features, self.in_features = weight.shape
        self.plan: Plan | None
        self.plan, constants = plan(weight, scheme.input) or (None, Constants())
        for name, tensor in constants._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        """The weight [out, in]."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.T if is_conv1d(module) else weight

    @classmethod
    def replacing(cls, module: nn.Module, weight: QTensor, scheme: Scheme, **calibrated: Any) -> "QuantizedLinear":
        """The 8-bit layer in the place of a Linear or a Conv1D."""
        return cls(weight, getattr(module, "bias", None), scheme, is_conv1d(module), **calibrated)

    def blank(self) -> nn.Module:
        """A Linear, or a Conv1D where there was one."""
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            conv1d: nn.Module = Conv1D(self.out_features, self.in_features)
            return conv1d
        return nn.Linear(self.in_features, self.out_features, self.bias is not None)

    @classmethod
    def same(cls, module: nn.Module) -> bool:
        """Whether a subclass of Linear with a forward of its own (Falcon's) still computes the same."""
        return isinstance(module, nn.Linear) and _computes_linear(module)

    @property
    def weight(self) -> Tensor:
        """The weight as a float tensor, for models that read it past ``forward``; made anew each time."""
        return self.quantized_weight.dequantize().T if self.transposed else self.quantized_weight.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` […, in] to […, out], in ``x``'s dtype."""
        if not x.is_floating_point() or x.dim() == 0 or x.size(-1) != self.in_features:
            raise OctavoError(f"the layer takes floats […, {self.in_features}], not {x.dtype} {list(x.shape)}")
        if self.scheme.outliers is not None and may_hold(x, self.scheme.outliers):
            return self.activate(multiply_apart(x, self.scheme.outliers, self.quantized_weight, self._multiply))
        y = self._multiply(x)
        return y if self.clamp is None else self.activate(y)

    def _multiply(self, x: Tensor) -> Tensor:
        """``x`` cast and multiplied, with the bias, before any clamp. Microseconds count here."""
        how = self.plan
        if how is None or x.dtype == torch.float64:
            return self._by_steps(x)
        has: dict[str, Any] = self._buffers  # quicker than attributes
        bias, weight = has["bias"], ops.Weight(has["codes"], has["scale"], how.rows, how.columns, has["table"])
        if x.is_meta or weight.codes.is_meta or weight.scale.is_meta or (bias is not None and bias.is_meta):
            self.check_place(x)
        if how.numbers is None:
            if x.requires_grad and torch.is_grad_enabled():
                y: Tensor = _WithGradient.apply(x, weight, bias, self)
            else:
                y = ops.linear_weight_only(x, weight, bias)
        else:
            x = x.detach() if x.requires_grad else x
            scale, zeros = has["input_scale"], has["input_zero_point"]
            if how.whole:
                scale = has["input_constant"]
                if scale is None:
                    assert self.scheme.input is not None
                    scale, zeros = scale_of_all(x, self.scheme.input)
            settings = (scale, zeros, how.affine, how.power_of_two)
            y = ops.linear(x, weight, bias, how.group, how.numbers, has["input_table"], *settings)
        return y

    def _by_steps(self, x: Tensor) -> Tensor:
        self.check_place(x)
        if self.scheme.input is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            with full_precision(x.device.type):
                return F.linear(x, self.quantized_weight.dequantize(x.dtype), bias)
        rows = self.quantize_input(x.reshape(x.shape[:-1].numel(), self.in_features))
        y = multiply(rows, self.quantized_weight, self.bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        clamp = "" if self.clamp is None else f", clamp={self.clamp}"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {describe(self.scheme)}{clamp}"


class _WithGradient(torch.autograd.Function):
    """``ops.linear_weight_only`` and its input's gradient, which meets no codes: that of ``x Wᵀ``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: ops.Weight, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return ops.linear_weight_only(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(gradient.device.type):
            return gradient @ ctx.layer.quantized_weight.dequantize(gradient.dtype), None, None, None


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Whether a class with a forward of its own still computes ``x Wᵀ + b`` and nothing else.

    It must hold nothing but weight and bias (an adapter holds more), and is tried on numbers of several sizes, as rows
    and as batches, in both modes. A layer without numbers (on meta) is tried with made-up ones.
    """
    own = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    if own - {"weight", "bias"} or any(module.children()):
        return False
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module)
    if module.weight.is_meta:
        twin = twin.to_empty(device="cpu")
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight, bias = twin.weight, twin.bias
    slack = max(1e-4, 4 * torch.finfo(weight.dtype).eps)
    for shape, size, training in [((3,), 1.0, False), ((2, 3), 1e-3, True), ((2, 3), 1e3, False), ((5,), 30.0, True)]:
        x = size * torch.randn(*shape, twin.in_features, generator=generator)
        x = x.to(weight.device, weight.dtype)
        try:
            y = twin.train(training).forward(x)  # past the hooks, which are not ours to call
        except Exception:  # it wants something else than rows
            return False
        expected = F.linear(x, weight, bias)
        if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
            return False
        if not torch.allclose(y, expected, rtol=slack, atol=slack * float(expected.abs().max() + 1e-6)):
            return False
    return True
