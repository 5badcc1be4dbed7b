"""The operators, each with its signature and the shape of its result: the one place that lists what can be fast.

``reference.py`` holds the law of each (plain torch, any device); ``cpu.py`` and ``cuda.py`` hold faster kernels that
must equal it. Operators know tensors and numbers only: formats, scales and layers belong to the rooms above.

A *number grid* is described to ``cast`` by raw numbers. ``mantissa`` bits follow the leading one, ``emin`` is the
exponent of the smallest normal number, ``low`` and ``high`` are the finite limits, ``flush`` says that there are no
subnormals, ``negative_zero`` that −0 exists. Floats and integers are the same thing here: an integer range is a float
grid whose numbers are all subnormal with a spacing of one.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rounding = Literal["nearest-even", "nearest-away", "toward-zero", "up", "down", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

#: What becomes of a value beyond the limits inside a kernel: the limit, an infinity, or NaN.
Overflow = Literal["saturate", "inf", "nan"]
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)


#: Integers that are summed at a time: 2**16 · 255 · 128 < 2**31, so no int32 sum overflows.
LONGEST = 1 << 16


class SumGrid(NamedTuple):
    """The numbers an accumulator can hold: ``mantissa`` (at most 23) and ``emin`` as above, ±``high`` the largest.

    ``flush``: no subnormals. ``infinite``: sums beyond ``high`` become ±∞; without it they stop there.
    """

    mantissa: int
    emin: int
    high: float
    flush: bool
    infinite: bool


LIBRARY = torch.library.Library("octavo", "DEF")

LIBRARY.define(
    "cast(Tensor x, int mantissa, int emin, float low, float high, str rounding, str overflow, bool flush, "
    "bool negative_zero, Tensor? noise) -> Tensor"
)
LIBRARY.define("encode(Tensor x, int mantissa, int emin, int first, int bits, bool signed, int inf, int nan) -> Tensor")
LIBRARY.define("decode(Tensor codes, Tensor table) -> Tensor")
LIBRARY.define(
    "quantize_rows(Tensor x, int group, Tensor? scale, Tensor? zeros, bool affine, bool power_of_two, int mantissa, "
    "int emin, float low, float high, bool flush, bool negative_zero, int bits, int nan) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("int_mm(Tensor a, Tensor b) -> Tensor")
LIBRARY.define("float_mm(Tensor a, Tensor b) -> Tensor")
LIBRARY.define(
    "scaled_mm(Tensor a, Tensor b, Tensor left, Tensor right, int stretch, Tensor? a_table, Tensor? b_table, "
    "Tensor? zeros, Tensor? bias, ScalarType dtype) -> Tensor"
)
for _name in ("linear", "linear_by_steps"):  # the latter is never replaced
    LIBRARY.define(
        f"{_name}(Tensor x, Tensor codes, Tensor scale, int rows, int columns, Tensor? table, Tensor? bias, "
        "Tensor? input_table, Tensor? input_scale, Tensor? input_zeros, int group, bool affine, bool power_of_two, "
        "int mantissa, int emin, float low, float high, bool flush, bool negative_zero, int bits, int nan) -> Tensor"
    )
for _name in ("linear_weight_only", "linear_weight_only_by_steps"):
    LIBRARY.define(
        f"{_name}(Tensor x, Tensor codes, Tensor scale, int rows, int columns, Tensor? table, Tensor? bias) -> Tensor"
    )
LIBRARY.define("scale_sums(Tensor sums, Tensor left, Tensor right, Tensor? bias, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "accumulate_mm(Tensor a, Tensor b, int mantissa, int emin, float high, bool flush, bool infinite, int chunk, "
    "int outer_mantissa, int outer_emin, float outer_high, bool outer_flush, bool outer_infinite, str rounding, "
    "int seed) -> Tensor"
)
LIBRARY.define("accumulate_mm_aligned(Tensor a, Tensor b, int align, int bits, int promote) -> Tensor")
LIBRARY.define("accumulate_mm_integer(Tensor a, Tensor b, int bits, bool saturate) -> Tensor")


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


@torch.library.register_fake("octavo::quantize_rows")
def _(
    x: Tensor,
    group: int,
    scale: Tensor | None,
    zeros: Tensor | None,
    affine: bool,
    power_of_two: bool,
    mantissa: int,
    emin: int,
    low: float,
    high: float,
    flush: bool,
    negative_zero: bool,
    bits: int,
    nan: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], -(-x.shape[1] // group)) if scale is None else scale.shape
    codes = torch.empty(x.shape, dtype=torch.int8 if mantissa == 23 and low < 0 else torch.uint8, device=x.device)
    found = torch.empty(shape, dtype=torch.float32, device=x.device)
    return codes, found, torch.empty(shape if affine else (0, 0), dtype=torch.int32, device=x.device)


@torch.library.register_fake("octavo::int_mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@torch.library.register_fake("octavo::float_mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)


@torch.library.register_fake("octavo::scaled_mm")
def _(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    stretch: int,
    a_table: Tensor | None,
    b_table: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@torch.library.register_fake("octavo::linear")
@torch.library.register_fake("octavo::linear_by_steps")
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    rows: int,
    columns: int,
    table: Tensor | None,
    bias: Tensor | None,
    input_table: Tensor | None,
    input_scale: Tensor | None,
    input_zeros: Tensor | None,
    group: int,
    affine: bool,
    power_of_two: bool,
    mantissa: int,
    emin: int,
    low: float,
    high: float,
    flush: bool,
    negative_zero: bool,
    bits: int,
    nan: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("octavo::linear_weight_only")
@torch.library.register_fake("octavo::linear_weight_only_by_steps")
def _(
    x: Tensor, codes: Tensor, scale: Tensor, rows: int, columns: int, table: Tensor | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.register_fake("octavo::scale_sums")
def _(sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(sums.shape, dtype=dtype, device=sums.device)


@torch.library.register_fake("octavo::accumulate_mm")
def _(
    a: Tensor,
    b: Tensor,
    mantissa: int,
    emin: int,
    high: float,
    flush: bool,
    infinite: bool,
    chunk: int,
    outer_mantissa: int,
    outer_emin: int,
    outer_high: float,
    outer_flush: bool,
    outer_infinite: bool,
    rounding: str,
    seed: int,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)


@torch.library.register_fake("octavo::accumulate_mm_aligned")
def _(a: Tensor, b: Tensor, align: int, bits: int, promote: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)


@torch.library.register_fake("octavo::accumulate_mm_integer")
def _(a: Tensor, b: Tensor, bits: int, saturate: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


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


class RowFormat(NamedTuple):
    """Numbers of at most 8 bits as ``quantize_rows`` makes them: a grid, and the code of NaN, −1 if there is none.

    ``mantissa`` = 23 says integers, whose codes are themselves: int8 if ``low`` < 0, else uint8.
    """

    mantissa: int
    emin: int
    low: float
    high: float
    flush: bool
    negative_zero: bool
    bits: int
    nan: int


def quantize_rows(
    x: Tensor,
    group: int,
    fmt: RowFormat,
    scale: Tensor | None = None,
    zeros: Tensor | None = None,
    affine: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of ``x / scale`` to nearest even, saturated, of x [M, K] in one pass: codes [M, K], scales, zero points.

    Every ``group`` neighbours of a row have a scale, the largest magnitude over ``high``, or the range over
    ``high − low`` and an int32 zero point if ``affine``; float32 [M, ⌈K/group⌉]. Or they are given, in that shape or
    [1, 1]. Where ``x`` is not finite its whole block has a NaN for a scale. Zero points are [0, 0] if not ``affine``.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.octavo.quantize_rows(
        x, group, scale, zeros, affine, power_of_two, *fmt
    )
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


def scaled_mm(
    a: Tensor,
    b: Tensor,
    left: Tensor,
    right: Tensor,
    stretch: int,
    a_table: Tensor | None = None,
    b_table: Tensor | None = None,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``A @ B.T`` of [M, K] and [N, K], scaled, plus a bias, in ``dtype`` [M, N]: a layer on codes, in one pass.

    A is ``a``, or ``a_table[a]`` where there is a table, and B likewise: bfloat16, or int8 in ``b`` with int8 or uint8
    in ``a``, less the int32 ``zeros`` of ``left``'s shape. K is cut into stretches of ``stretch``, and each is summed
    as by ``float_mm`` or ``int_mm``; ``left`` [M or 1, S or 1] and ``right`` [N or 1, S or 1] are the float32 scales of
    each of S stretches. Roundings to float32, in this order: ``(sum · left) · right`` of a stretch, added to that of
    the stretches before; then ``+ bias`` [N]; then to ``dtype``. Integers: ``stretch`` ≤ 65536.
    """
    result: Tensor = torch.ops.octavo.scaled_mm(a, b, left, right, stretch, a_table, b_table, zeros, bias, dtype)
    return result


class Weight(NamedTuple):
    """A layer's weight [N, K] as the operators below take it.

    ``codes`` are bytes; ``scale`` is float32 with one number for every block of ``rows`` × ``columns``, ``table`` the
    bfloat16 that each of 256 codes stands for (int8 codes: themselves), or None for int8 that is to be multiplied as
    integers.
    """

    codes: Tensor
    scale: Tensor
    rows: int
    columns: int
    table: Tensor | None


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    group: int,
    fmt: RowFormat,
    table: Tensor | None = None,
    scale: Tensor | None = None,
    zeros: Tensor | None = None,
    affine: bool = False,
    power_of_two: bool = False,
) -> Tensor:
    """A layer with 8-bit inputs: x […, K] to […, N] in x's dtype, ``quantize_rows`` and ``scaled_mm`` in one call.

    Every ``group`` neighbours of a row of ``x`` become codes with a scale of their own, or all with the one number of
    ``scale`` (and of ``zeros``). ``table`` stands to these codes as ``weight.table`` does to the weight's: both, or
    neither. Where both have several scales along K, the smaller of ``group`` and ``weight.columns`` divides the other.
    """
    result: Tensor = torch.ops.octavo.linear(x, *weight, bias, table, scale, zeros, group, affine, power_of_two, *fmt)
    return result


def linear_weight_only(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """A layer whose input stays as it is: x […, K] to […, N] in x's dtype; ``weight`` always has its table.

    Products of x and unscaled codes are summed in float32 (float64 for such an x), then scaled: a stretch of K after
    the other where there are several scales; or the weight is made float32 first. Then the bias is added, and rounded.
    """
    result: Tensor = torch.ops.octavo.linear_weight_only(x, *weight, bias)
    return result


def scale_sums(
    sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``sums · left · right.T + bias`` of [M, N] sums, integer or float, in ``dtype``, in one pass.

    ``left`` [M or 1, 1] and ``right`` [N or 1, 1] are float32, ``bias`` [N]. Roundings, all but the last to float32:
    of the sums, after ``left``, after ``right``, after the bias, to ``dtype``.
    """
    result: Tensor = torch.ops.octavo.scale_sums(sums, left, right, bias, dtype)
    return result


def accumulate_mm(
    a: Tensor,
    b: Tensor,
    inner: SumGrid,
    rounding: Rounding = "nearest-even",
    chunk: int = 0,
    outer: SumGrid | None = None,
    seed: int = 0,
) -> Tensor:
    """``a @ b.T`` of float32 [M, K] and [N, K] with every sum rounded to a grid; float32 [M, N].

    K ascending from zero, ``sum = round(sum + exact product)``, one rounding each. With ``chunk`` > 0 the sum starts
    anew every ``chunk`` products, and the finished ones are added, in order from zero, on the ``outer`` grid (the same
    by default), rounded likewise. A finite sum that overflows is limited as the grid says; infinities and NaN among the
    operands propagate as in IEEE 754, whatever the grid. A zero result is +0.

    Stochastic rounding goes outward with probability ⌊fraction · 2**24⌋ / 2**24; the random bits are a hash of
    (``seed``, m, n, number of the addition), so they depend on nothing else.
    """
    result: Tensor = torch.ops.octavo.accumulate_mm(a, b, *inner, chunk, *(outer or inner), rounding, seed)
    return result


def accumulate_mm_aligned(a: Tensor, b: Tensor, align: int, bits: int, promote: int = 0) -> Tensor:
    """``a @ b.T`` of float32 [M, K] and [N, K] as a tensor core adds; float32 [M, N].

    ``align`` products and the sum so far are cut off toward zero at the bit ``bits`` − 1 below the leading bit of the
    largest of them, and added exactly: that is the new sum. Every ``promote`` products (0: only at the end) it is
    rounded to float32, added to a float32 total, and starts anew. ``(align + 1) · 2**bits`` may not exceed 2**53.
    Infinities and NaN propagate as in IEEE 754.
    """
    result: Tensor = torch.ops.octavo.accumulate_mm_aligned(a, b, align, bits, promote)
    return result


def accumulate_mm_integer(a: Tensor, b: Tensor, bits: int = 32, saturate: bool = False) -> Tensor:
    """``a @ b.T`` of integers, given as float32 [M, K] and [N, K], in two's complement of ``bits`` ≤ 32; int32 [M, N].

    After every addition, K ascending, the sum wraps around or stops at the limit.
    """
    result: Tensor = torch.ops.octavo.accumulate_mm_integer(a, b, bits, saturate)
    return result
