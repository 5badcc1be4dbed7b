"""A linear layer whose weight is 8-bit codes, and whose input may be too.

Stands in for ``torch.nn.Linear`` and for transformers' ``Conv1D`` (GPT-2), whose weight is stored the other way round.
Inference only: gradients do not flow through the codes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.core.cast import quantize_unchecked
from octavo.core.matmul import multiply
from octavo.core.qtensor import QTensor
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError

KEPT = ("codes", "scale", "zero_point")  # ``Module.to(dtype)`` must not touch these


class QuantizedLinear(nn.Module):
    """``y = x Wᵀ + b`` with W [out, in] as codes and scales, and x […, in] cast as the scheme says.

    ``transposed`` remembers that the layer it replaced held its weight as [in, out].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QTensor, bias: Tensor | None, scheme: Scheme, transposed: bool = False) -> None:
        super().__init__()
        self.scheme = scheme
        self.transposed = transposed
        self.out_features, self.in_features = weight.shape
        self.block = weight.block
        self.dtype = weight.dtype
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The weight as a float tensor, for models that read it past ``forward``; made anew each time."""
        return self.quantized_weight.dequantize().T if self.transposed else self.quantized_weight.dequantize()

    @property
    def quantized_weight(self) -> QTensor:
        """The weight [out, in] as codes and scales."""
        return QTensor(self.codes, self.scale, self.zero_point, self.scheme.weight.format, self.block, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` […, in] to […, out], in ``x``'s dtype."""
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise OctavoError(f"the layer takes floats […, {self.in_features}], not {x.dtype} {list(x.shape)}")
        how = self.scheme.input
        if how is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.quantized_weight.dequantize(x.dtype), bias)
        rows = quantize_unchecked(x.reshape(x.shape[:-1].numel(), self.in_features), how)
        y = multiply(rows, self.quantized_weight)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # codes and scales follow the module to another device, but keep their dtypes: rounded scales are other weights
        before = {name: getattr(self, name) for name in KEPT}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if tensor is not None and moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device)).dtype
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {describe(self.scheme)}"


def from_float(weight: Tensor, bias: Tensor | None, scheme: Scheme, transposed: bool = False) -> QuantizedLinear:
    """Quantize a weight [out, in] ([in, out] if ``transposed``). Its scales are rounded to its own dtype."""
    matrix = weight.detach().T if transposed else weight.detach()
    return QuantizedLinear(quantize_unchecked(matrix, scheme.weight, matrix.dtype), bias, scheme, transposed)


def empty(
    out_features: int, in_features: int, bias: bool, scheme: Scheme, dtype: torch.dtype, transposed: bool = False
) -> QuantizedLinear:
    """A layer of the right shapes to load a checkpoint into."""
    weight = torch.zeros(out_features, in_features, dtype=dtype)
    return QuantizedLinear(
        quantize_unchecked(weight, scheme.weight, dtype),
        torch.zeros(out_features, dtype=dtype) if bias else None,
        scheme,
        transposed,
    )
