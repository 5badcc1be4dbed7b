"""Modules whose weights are 8-bit codes."""

from octavo.nn.linear import QuantizedLinear

__all__ = ["QuantizedLinear"]
