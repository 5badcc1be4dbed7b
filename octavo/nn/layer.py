"""What every 8-bit layer is made of: a weight as codes and scales, a bias, and how its input is cast.

The weight is kept as a matrix whose rows are the output channels, whatever shape the float layer gave it, so that a
granularity means the same everywhere: ``PerChannel(0)`` is a scale an output channel, ``PerGroup(64)`` one for 64
numbers that are summed together. Inference only: gradients do not flow through codes; where inputs stay floats they
get theirs.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from octavo import ops
from octavo.core.cast import quantize_scaled, quantize_unchecked
from octavo.core.layer import Constants
from octavo.core.qtensor import QTensor
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError

# what ``Module.to(dtype)`` must not touch
KEPT = ("codes", "scale", "zero_point", "input_scale", "input_zero_point", *Constants._fields)


class QuantizedLayer(nn.Module):
    """A layer with its weight [out, …] in 8 bits, and its input too if the scheme says so.

    ``input_scale`` (and ``input_zero_point``), one number each, belong to static schemes. ``clamp`` is the range that
    results are held to, for a layer that has taken over the ReLU behind it (``ptq.fold.fuse_relu_``).
    """

    by_name_only: ClassVar[bool] = False  # whether only a rule with its exact name or type may quantize it
    computes: ClassVar[tuple[str, ...]] = ("forward",)  # the float layer's methods that this one stands in for

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    clamp: tuple[float, float] | None = None

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        scheme: Scheme,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        ops.native.bind()
        given = (input_scale is not None, input_zero_point is not None)
        if given != (scheme.static, scheme.static and scheme.input is not None and scheme.input.affine):
            raise OctavoError(f"{describe(scheme)} {'needs' if scheme.static else 'has no'} calibrated input scales")
        self.scheme = scheme
        self.block = weight.block
        self.dtype = weight.dtype
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.reshape(1))
        self.register_buffer("input_zero_point", None if input_zero_point is None else input_zero_point.reshape(1))
        self.requires_grad_(False)

    @staticmethod
    @abstractmethod
    def matrix(module: nn.Module) -> Tensor:
        """The float layer's weight as a matrix: a row an output channel, a column a number that is summed."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight as a float tensor of the float layer's shape, made anew each time."""

    @classmethod
    @abstractmethod
    def replacing(cls, module: nn.Module, weight: QTensor, scheme: Scheme, **calibrated: Any) -> "QuantizedLayer":
        """The 8-bit layer that stands in for a float one, with its weight matrix quantized already.

        ``calibrated``: the ``input_scale`` and ``input_zero_point`` of a static scheme.
        """

    @abstractmethod
    def blank(self) -> nn.Module:
        """A float layer of the same shape and settings, whose numbers are yet to come."""

    @classmethod
    def obstacle(cls, module: nn.Module, scheme: Scheme) -> str | None:
        """Why this float layer cannot run under the scheme, or None."""
        rows, cols = cls.matrix(module).shape
        try:
            scheme.weight.granularity.block((rows, cols))
            if scheme.input is not None:
                scheme.input.granularity.block((1, cols))
        except OctavoError as error:
            return str(error)
        return None

    @classmethod
    def same(cls, module: nn.Module) -> bool:
        """Whether a float layer whose class overrides one of ``computes`` still computes the same."""
        return False

    @classmethod
    def runs(cls, scheme: Scheme) -> Scheme:
        """The part of the scheme that means something to this kind of layer."""
        return scheme

    @classmethod
    def from_float(cls, module: nn.Module, scheme: Scheme) -> "QuantizedLayer":
        """Quantize a float layer. Its weight's scales are rounded to its own dtype."""
        matrix = cls.matrix(module).detach()
        return cls.replacing(module, quantize_unchecked(matrix, scheme.weight, matrix.dtype), scheme)

    def to_float(self) -> nn.Module:
        """The float layer again, with the numbers that the codes stand for, rounded to ``dtype``.

        Raises ``OctavoError`` if this layer does the work of another one too.
        """
        if self.clamp is not None:
            raise OctavoError("it has taken over a ReLU, which a float layer cannot; convert first, then fuse")
        with torch.device("meta"):
            module = self.blank()
        module.weight = nn.Parameter(self.weight.contiguous())
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.clone())
        return module.train(self.training)

    @property
    def quantized_weight(self) -> QTensor:
        """The weight matrix [out, in] as codes and scales."""
        return QTensor(self.codes, self.scale, self.zero_point, self.scheme.weight.format, self.block, self.dtype)

    def quantize_input(self, x: Tensor) -> QTensor:
        """``x`` as the scheme casts inputs: with its own scales, or with the calibrated ones."""
        how = self.scheme.input
        assert how is not None
        if self.input_scale is None:
            return quantize_unchecked(x, how)
        return quantize_scaled(x, how, self.input_scale, self.input_zero_point)

    def check_place(self, x: Tensor) -> None:
        """Raise ``OctavoError`` where ``x`` is on meta and the layer is not, or in part: torch would give a result."""
        for name, tensor in self._buffers.items():
            if tensor is not None and tensor.is_meta is not x.is_meta:
                where = f"the input is on meta and {name}" if x.is_meta else f"{name} is on meta and the input"
                raise OctavoError(f"{self}: {where} is not. Load or move all of them before the layer runs")

    def activate(self, y: Tensor) -> Tensor:
        """Hold the results to ``clamp``, in place: the last of ``forward``."""
        return y if self.clamp is None else y.clamp_(*self.clamp)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLayer":
        # codes and scales follow the module to another device, but keep their dtypes: rounded scales are other weights
        before = {name: tensor for name in KEPT if (tensor := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device)).dtype
        return self


def tables_of(module: nn.Module) -> set[int]:
    """The ids of a layer's tables of numbers, which belong to its formats, as code does, and not to its weights."""
    buffers = module._buffers if isinstance(module, QuantizedLayer) else {}
    return {id(buffers[name]) for name in Constants._fields if buffers.get(name) is not None}
