"""Operators on raw tensors: ``schema`` declares them, ``reference`` is the law, ``cpu`` and ``cuda`` are the speed."""

from octavo.ops import cpu, cuda, reference
from octavo.ops.schema import (
    OVERFLOWS,
    ROUNDINGS,
    Overflow,
    Rounding,
    SumGrid,
    accumulate_mm,
    accumulate_mm_aligned,
    accumulate_mm_integer,
    cast,
    decode,
    encode,
    float_mm,
    int_mm,
    scale_sums,
    scaled_mm,
)

__all__ = [
    "OVERFLOWS",
    "ROUNDINGS",
    "Overflow",
    "Rounding",
    "SumGrid",
    "accumulate_mm",
    "accumulate_mm_aligned",
    "accumulate_mm_integer",
    "cast",
    "cpu",
    "cuda",
    "decode",
    "encode",
    "float_mm",
    "int_mm",
    "reference",
    "scale_sums",
    "scaled_mm",
]
