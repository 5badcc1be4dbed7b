"""What 8-bit codes stand for, and how real numbers become codes: ``value = scale · (code − zero_point)``."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.core import records
from octavo.core.formats import INT8, IntegerFormat
from octavo.errors import OctavoError


@dataclass(frozen=True)
class Encoding:
    """What the codes of one tensor stand for: ``value = scale · (code − zero_point)`` with ``low ≤ code ≤ high``.

    ``scale`` is a float32 number. ``low`` and ``high`` lie within ``format``; an activation such as ReLU narrows them.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    format: IntegerFormat = INT8

    def __post_init__(self) -> None:
        fmt = self.format
        if not isinstance(fmt, IntegerFormat) or fmt.code_dtype not in (torch.int8, torch.uint8):
            raise OctavoError(f"codes of integer-only inference are integers of at most 8 bits, not {fmt}")
        if type(self.scale) is not float or not (0 < self.scale < math.inf):
            raise OctavoError(f"a scale is positive and finite, not {self.scale!r}")
        if float(torch.tensor(self.scale, dtype=torch.float32)) != self.scale:
            raise OctavoError(f"a scale is a float32 number, and {self.scale!r} is none")
        integers = (self.zero_point, self.low, self.high)
        if not all(type(n) is int and fmt.low <= n <= fmt.high for n in integers) or self.low > self.high:
            raise OctavoError(f"zero point {self.zero_point} and codes {self.low} … {self.high} do not fit {fmt}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return self.format.code_dtype

    @property
    def widest(self) -> int:
        """The largest magnitude that ``code − zero_point`` can have in this format, whatever the zero point."""
        return self.format.high - self.format.low

    def quantize(self, x: Tensor) -> Tensor:
        """The nearest codes (ties to even) of a tensor of real numbers; what lies beyond the range saturates."""
        x = x if x.dtype == torch.float64 else x.float()
        return self.clamp((x / x.new_tensor(self.scale)).round_() + self.zero_point)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes in float32, rounded once."""
        return (codes.int() - self.zero_point).float() * self.scale

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes (or of float64 integers) in float64, exactly."""
        return (codes.double() - self.zero_point) * self.scale

    def fake_quantize(self, values: Tensor) -> Tensor:
        """Values rounded to the nearest that has a code; float64."""
        return self.values(self.quantize(values))

    def clamp(self, numbers: Tensor) -> Tensor:
        """Integers of any dtype, saturated to codes."""
        return numbers.clamp(self.low, self.high).to(self.dtype)

    def coarser(self, least: float) -> "Encoding":
        """The same with a scale of at least ``least``."""
        scale = float(torch.tensor(least, dtype=torch.float32))
        return replace(self, scale=scale) if self.scale < scale else self

    def limited(self, low: float, high: float) -> "Encoding":
        """The same for a tensor clamped to the real numbers ``low … high``."""
        bottom, top = (self.zero_point + _nearest(end / self.scale) for end in (low, high))
        bottom, top = (min(max(end, self.low), self.high) for end in (bottom, top))
        return replace(self, low=bottom, high=top)

    def to_json(self) -> dict[str, Any]:
        """Its fields as what ``json.dumps`` takes."""
        return {**vars(self), "format": records.to_json(self.format)}

    @staticmethod
    def from_json(data: Any) -> "Encoding":
        """What ``to_json`` was given. Raises ``OctavoError`` or ``TypeError`` for anything else."""
        return Encoding(**{**data, "format": records.from_json(data["format"])})


def _nearest(x: float) -> int:
    """The nearest integer, ties to even, within ±2**31."""
    return round(min(max(x, -(2.0**31)), 2.0**31))
