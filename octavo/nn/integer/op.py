"""What an operation on codes is: it says what it does three times.

- ``forward``: on codes. No float is made anywhere.
- ``real``: on real numbers, in float64, by torch's own float operator: what the codes stand for.
- ``rounded``: ``real`` and then the rounding that ``forward`` performs, in float64.

``rounded`` *equals* ``forward``. All real numbers that go in have codes, so a sum of products of them is an integer
number of units, below 2**31. In float64 its relative error is at most K · 2**−53: less than half a unit for K < 2**21
products, so dividing by the unit and rounding gives the integer back. The two roundings of fixed-point requantization
that follow are exact in float64: see ``rescale``.

``output.fake_quantize(real(…))`` is the usual simulation instead, which rounds the real number to the nearest code.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo import ops
from octavo.core.requantize import INT32_MAX, INT32_MIN, fixed_point, multiply_fixed_point
from octavo.errors import OctavoError
from octavo.nn.integer.encoding import Encoding


def rescale(x: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """int32 numbers times ``multiplier · 2**(shift − 31)``, with gemmlowp's two roundings, and its saturation.

    Integers stay integers. In float64 the same integers come out: a product of 62 bits would not fit, so the multiplier
    goes in two halves, ``m = 2**16·h + l``, and ``⌊(x·m + 2**30) / 2**31⌋ = ⌊(x·h + ⌊(x·l + 2**30) / 2**16⌋) / 2**15⌋``
    stays below 2**53 in every step.
    """
    if not x.is_floating_point():
        return multiply_fixed_point(x, multiplier, shift)
    raised = (x * ops.reference.pow2(shift.clamp(min=0))).clamp(INT32_MIN, INT32_MAX)
    high, low = (multiplier >> 16).double(), (multiplier & 0xFFFF).double()
    carried = ((raised * low + 2.0**30) / 2.0**16).floor()
    product = ((raised * high + carried) / 2.0**15).floor()
    return (product.abs() / ops.reference.pow2((-shift).clamp(min=0)) + 0.5).floor().copysign(product)


class IntegerOp(nn.Module):
    """One layer on codes. ``inputs`` and ``output`` are the encodings of what goes in and comes out.

    ``settings`` names the arguments that go to JSON, ``tensors`` those that are buffers.
    """

    arity: ClassVar[int] = 1  # how many tensors go in, −1: any number
    settings: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, inputs: Sequence[Encoding], output: Encoding) -> None:
        super().__init__()
        self.inputs, self.output = tuple(inputs), output
        if len(self.inputs) != self.arity and self.arity >= 0:
            raise OctavoError(f"{type(self).__name__} takes {self.arity} tensors, not {len(self.inputs)}")

    @abstractmethod
    def real(self, *values: Tensor) -> Tensor:
        """The layer on real numbers, float64 in and out, nothing rounded."""

    @abstractmethod
    def rounded(self, *values: Tensor) -> Tensor:
        """The layer on real numbers that have codes, rounded as ``forward`` rounds; float64."""

    def _codes(self, scaled: Tensor) -> Tensor:
        """Integers in units of the output's scale as codes."""
        return self.output.clamp(scaled + self.output.zero_point)

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, as what ``json.dumps`` takes."""
        ends = {"inputs": [encoding.to_json() for encoding in self.inputs], "output": self.output.to_json()}
        return {"op": type(self).__name__, **ends, **{name: getattr(self, name) for name in self.settings}}

    def extra_repr(self) -> str:
        """The settings and the output's encoding."""
        told = [f"{name}={getattr(self, name)}" for name in self.settings]
        return ", ".join([*told, f"scale={self.output.scale:.4g}", f"zero_point={self.output.zero_point}"])


class ExactOp(IntegerOp):
    """An operation whose result needs no rounding."""

    def rounded(self, *values: Tensor) -> Tensor:
        """The same as ``real``."""
        return self.real(*values)


class KeepingOp(ExactOp):
    """An operation that chooses, moves or copies codes: its output has its input's encoding."""

    def __init__(self, inputs: Sequence[Encoding], output: Encoding) -> None:
        super().__init__(inputs, output)
        if self.inputs[0] != output:
            raise OctavoError(f"{type(self).__name__} changes no numbers, so its output has its input's encoding")


class RescalingOp(IntegerOp):
    """An operation that brings integers to its output's unit: real ratios as fixed-point multipliers, made ahead."""

    multiplier: Tensor
    shift: Tensor

    def _set_ratios(self, ratios: Tensor | Sequence[float]) -> None:
        # not in the state: they follow from the scales
        multiplier, shift = fixed_point(torch.as_tensor(ratios, dtype=torch.float64))
        self.register_buffer("multiplier", multiplier, persistent=False)
        self.register_buffer("shift", shift, persistent=False)


def centred(codes: Tensor, encoding: Encoding) -> Tensor:
    """``code − zero_point`` in int32."""
    return codes.int() - encoding.zero_point


def counted(values: Tensor, unit: float | Tensor) -> Tensor:
    """Values in units of ``unit``, of which they are whole multiples up to float64's rounding; float64."""
    return (values / unit).round()


def pad(x: Tensor, sides: Sequence[tuple[int, int]], fill: float) -> Tensor:
    """The last dimensions, as many as there are ``sides``, padded before and after; negative sides cut off."""
    if not any(before or after for before, after in sides):
        return x
    return F.pad(x, [n for pair in reversed(sides) for n in pair], value=fill)
