"""Sums of products: linear layers and convolutions on codes.

``Σ(x − z)w + b = Σxw + (b − zΣw)``: the matrix product runs on int8 codes, its correction is known ahead.
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo import ops
from octavo.core.requantize import INT32_MAX
from octavo.errors import OctavoError
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.op import RescalingOp, counted, pad, rescale


class _WeightedSum(RescalingOp):
    """Sums of inputs times symmetric weights, one scale an output channel, plus a bias in units of their product.

    ``weight``: int8 codes [out, …]; ``weight_scale``: float32 [out]; ``bias``: int32 [out].
    """

    tensors = ("weight", "weight_scale", "bias")
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    offset: Tensor

    def __init__(
        self, inputs: Sequence[Encoding], output: Encoding, weight: Tensor, weight_scale: Tensor, bias: Tensor
    ) -> None:
        super().__init__(inputs, output)
        out = weight.shape[:1]
        fits = weight.dtype == torch.int8 and weight_scale.dtype == torch.float32 and bias.dtype == torch.int32
        if not fits or weight.dim() < 2 or not out == weight_scale.shape == bias.shape:
            raise OctavoError("a weighted sum needs int8 weights [out, …], float32 scales [out], an int32 bias [out]")
        if not bool(((weight_scale > 0) & weight_scale.isfinite()).all()):
            raise OctavoError("the scales of its weights are not all positive and finite")
        total = weight.long().flatten(1)
        most = total.abs().sum(1) * inputs[0].widest + bias.long().abs()
        if bool((most > INT32_MAX).any()):
            channel = int(most.argmax())
            raise OctavoError(
                f"the sums of output channel {channel} may reach {int(most[channel]):,}, which int32 cannot hold "
                f"({weight[0].numel()} products each); split the layer, or quantize its weights to fewer bits"
            )
        for name, tensor in (("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
            self.register_buffer(name, tensor)
        self._set_ratios(self._per_channel(self._unit / output.scale))
        offset = bias - self._moved(inputs[0].zero_point) * total.sum(1).int()
        self.register_buffer("offset", self._per_channel(offset), persistent=False)

    @abstractmethod
    def _per_channel(self, x: Tensor) -> Tensor:
        """A tensor [out] in the shape in which it meets the layer's result."""

    @abstractmethod
    def _sums(self, x: Tensor) -> Tensor:
        """``Σxw`` of int8 inputs and the weights, int32."""

    def _moved(self, code: int) -> int:
        """A code as it is in int8: unsigned ones move down by 128."""
        return code - 128 if self.inputs[0].dtype == torch.uint8 else code

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes: a sum in int32, a multiplier and a shift."""
        x = codes if codes.dtype == torch.int8 else (codes.short() - 128).to(torch.int8)
        total = self._sums(x) + self.offset
        return self._codes(rescale(total, self.multiplier, self.shift))

    @property
    def _unit(self) -> Tensor:
        """What one in the int32 sums is worth, float64 [out]."""
        return self.inputs[0].scale * self.weight_scale.double()

    @property
    def _real_weight(self) -> Tensor:
        return self.weight.double() * self.weight_scale.double().reshape(-1, *(1,) * (self.weight.dim() - 1))

    def rounded(self, *values: Tensor) -> Tensor:
        """The real sum, brought back to an integer number of units, and the two roundings."""
        total = counted(self.real(*values), self._per_channel(self._unit))
        return self.output.values(self._codes(rescale(total, self.multiplier, self.shift)))


class Linear(_WeightedSum):
    """``x @ weight.T + bias``: weight [out, in], x […, in]."""

    def _per_channel(self, x: Tensor) -> Tensor:
        return x

    def _sums(self, x: Tensor) -> Tensor:
        many = math.prod(x.shape[:-1])
        return ops.int_mm(x.reshape(many, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.weight.shape[0])

    def real(self, *values: Tensor) -> Tensor:
        """A float64 linear layer."""
        return F.linear(values[0], self._real_weight, self.bias * self._unit)


class Convolution(_WeightedSum):
    """A convolution over any number of dimensions: weight [out, in / groups, …], x [N, in, …].

    ``stride`` and ``dilation`` have a number a dimension, ``padding`` a pair (before, after), negative to cut off.
    ``spread`` first inserts zeros between neighbours, so that they stand that far apart: a transposed convolution is
    one of a spread input and flipped weights.
    """

    settings = ("stride", "padding", "dilation", "groups", "spread")

    def __init__(
        self,
        inputs: Sequence[Encoding],
        output: Encoding,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor,
        stride: tuple[int, ...],
        padding: tuple[tuple[int, int], ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        spread: tuple[int, ...] = (),
    ) -> None:
        super().__init__(inputs, output, weight, weight_scale, bias)
        self.dimensions = weight.dim() - 2
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.spread = spread or (1,) * self.dimensions
        counts = {len(stride), len(padding), len(dilation), len(self.spread), self.dimensions}
        if len(counts) > 1 or self.dimensions < 1 or min(*stride, *dilation, *self.spread, groups) < 1:
            raise OctavoError("a convolution needs a stride, a padding and a dilation for each dimension of its kernel")
        if weight.shape[0] % groups:
            raise OctavoError(f"{weight.shape[0]} output channels cannot be divided into {groups} groups")

    def _per_channel(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *(1,) * (self.weight.dim() - 2))

    def _prepared(self, x: Tensor, zero: int) -> Tensor:
        """The input spread and padded with what stands for zero."""
        if max(self.spread) > 1:
            sizes = [(n - 1) * apart + 1 for n, apart in zip(x.shape[2:], self.spread, strict=True)]
            wide = x.new_full((*x.shape[:2], *sizes), zero)
            places: Any = (..., *(slice(None, None, apart) for apart in self.spread))
            wide[places] = x
            x = wide
        return pad(x, self.padding, zero)

    def _sums(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[2:]
        if x.shape[1] != self.weight.shape[1] * self.groups:
            raise OctavoError(f"it has {self.weight.shape[1] * self.groups} input channels, not {x.shape[1]}")
        x = self._prepared(x, self._moved(self.inputs[0].zero_point))
        for place, (size, stride, dilation) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(place, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # a view of windows: [N, in, …places, …kernel]
        return self._by_channel(x) if self.weight.shape[1] == 1 and self.groups > 1 else self._by_matrix(x)

    def _by_channel(self, windows: Tensor) -> Tensor:
        """Depthwise: a product a tap, where a matrix product would have next to nothing to sum."""
        total: Tensor | None = None
        copies = self.weight.shape[0] // self.groups
        for tap in itertools.product(*map(range, self.weight.shape[2:])):
            place: Any = (..., *tap)
            x = windows[place].int()
            x = x.repeat_interleave(copies, 1) if copies > 1 else x
            part = x * self._per_channel(self.weight[:, 0][place].int())
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _by_matrix(self, windows: Tensor) -> Tensor:
        """Windows as the rows of a matrix, weights as those of another, group by group."""
        many, places = windows.shape[0], windows.shape[2 : 2 + self.dimensions]
        parts = []
        for x, weight in zip(windows.chunk(self.groups, 1), self.weight.chunk(self.groups), strict=True):
            rows = x.movedim(1, 1 + self.dimensions).reshape(many * math.prod(places), weight[0].numel())
            parts.append(ops.int_mm(rows, weight.flatten(1)).reshape(many, *places, len(weight)).movedim(-1, 1))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def real(self, *values: Tensor) -> Tensor:
        """The float64 convolution."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dimensions - 1]
        x = self._prepared(values[0], 0)
        return convolve(x, self._real_weight, self.bias * self._unit, self.stride, 0, self.dilation, self.groups)
