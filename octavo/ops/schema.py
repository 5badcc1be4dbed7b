"""The operators, each with its signature and the shape of its result: the one place that lists what can be fast.

``reference.py`` holds the law of each (plain torch, any device); ``cpu.py`` and ``cuda.py`` hold faster kernels that
must equal it. Operators know tensors and numbers only: formats, scales and layers belong to the rooms above.

A *number grid* is described to ``cast`` by raw numbers. ``mantissa`` bits follow the leading one, ``emin`` is the
exponent of the smallest normal number, ``low`` and ``high`` are the finite limits, ``flush`` says that there are no
subnormals, ``negative_zero`` that −0 exists. Floats and integers are the same thing here: an integer range is a float
grid whose numbers are all subnormal with a spacing of one.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Rounding = Literal["nearest-even", "nearest-away", "toward-zero", "up", "down", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

#: What becomes of a value beyond the limits inside a kernel: the limit, an infinity, or NaN.
Overflow = Literal["saturate", "inf", "nan"]
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)

LIBRARY = torch.library.Library("octavo", "DEF")

LIBRARY.define(
    "cast(Tensor x, int mantissa, int emin, float low, float high, str rounding, str overflow, bool flush, "
    "bool negative_zero, Tensor? noise) -> Tensor"
)
LIBRARY.define("encode(Tensor x, int mantissa, int emin, int first, int bits, bool signed, int inf, int nan) -> Tensor")
LIBRARY.define("decode(Tensor codes, Tensor table) -> Tensor")
LIBRARY.define("int_mm(Tensor a, Tensor b) -> Tensor")
LIBRARY.define("float_mm(Tensor a, Tensor b) -> Tensor")


@torch.library.register_fake("octavo::cast")
def _(
    x: Tensor,
    mantissa: int,
    emin: int,
    low: float,
    high: float,
    rounding: str,
    overflow: str,
    flush: bool,
    negative_zero: bool,
    noise: Tensor | None,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("octavo::encode")
def _(x: Tensor, mantissa: int, emin: int, first: int, bits: int, signed: bool, inf: int, nan: int) -> Tensor:
    return torch.empty(x.shape, dtype=code_dtype(bits), device=x.device)


@torch.library.register_fake("octavo::decode")
def _(codes: Tensor, table: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=table.dtype, device=codes.device)


@torch.library.register_fake("octavo::int_mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@torch.library.register_fake("octavo::float_mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)


def code_dtype(bits: int) -> torch.dtype:
    """The dtype of the codes of a float format."""
    return torch.uint8 if bits <= 8 else torch.int32


def cast(
    x: Tensor,
    mantissa: int,
    emin: int,
    low: float,
    high: float,
    rounding: str,
    overflow: str,
    flush: bool,
    negative_zero: bool,
    noise: Tensor | None = None,
) -> Tensor:
    """Round every element of ``x`` (any float dtype, any shape) to the number grid; same dtype and shape, contiguous.

    ``noise``, uniform in [0, 1) and of ``x``'s shape, decides stochastic rounding; the other modes ignore it. A grid
    value that ``x.dtype`` cannot hold is rounded to nearest-even in that dtype.
    """
    result: Tensor = torch.ops.octavo.cast(
        x, mantissa, emin, low, high, rounding, overflow, flush, negative_zero, noise
    )
    return result


def encode(x: Tensor, mantissa: int, emin: int, first: int, bits: int, signed: bool, inf: int, nan: int) -> Tensor:
    """Integer codes (sign | exponent | mantissa) of values that lie on a float grid.

    ``first`` is the exponent field of ``2**emin`` (1, or 0 in a format without zero), ``inf`` and ``nan`` the codes of
    the positive infinity and NaN, −1 where there is none. uint8 for formats of at
    most 8 bits, int32 for wider ones.
    """
    result: Tensor = torch.ops.octavo.encode(x, mantissa, emin, first, bits, signed, inf, nan)
    return result


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """``table[codes]``: the values behind codes; ``table`` has one entry a code and decides the dtype."""
    result: Tensor = torch.ops.octavo.decode(codes, table)
    return result


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 [M, K] and int8 [N, K], exactly, in int32 [M, N]. K ≤ 131071 keeps every sum in range."""
    result: Tensor = torch.ops.octavo.int_mm(a, b)
    return result


def float_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of bfloat16 or float32 [M, K] and [N, K] with FP32 accumulation, in float32 [M, N].

    bfloat16 products are exact in FP32, and every value of an 8-bit format is exact in bfloat16: so this
    multiplies FP8.
    Kernels differ from the exact sum by at most ``K · 2**-24 · (|a| @ |b|.T)``, the bound of FP32 summation.
    """
    result: Tensor = torch.ops.octavo.float_mm(a, b)
    return result
