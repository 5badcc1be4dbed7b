"""The CPU's kernels: torch's integer GEMM, and our compiled cast and BF16 GEMM where this machine can run them.

Whatever cannot be served here goes to the law in ``reference.py``: slower, never different.
"""

import torch
from torch import Tensor

from octavo.ops import accumulate, native, reference
from octavo.ops.schema import LIBRARY, RowFormat, SumGrid, code_dtype

CHUNK = 1 << 20  # elements that the float64 law works on at a time, so that its temporaries stay small


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
    """Round to a number grid in one pass, natively where possible."""
    grid = (mantissa, emin, low, high, rounding, overflow, flush, negative_zero)
    x = x.contiguous()
    noise = None if noise is None else noise.contiguous()
    fast = native.cast(x, *grid, noise)
    if fast is not None:
        return fast
    if x.numel() <= CHUNK:
        return reference.cast(x, *grid, noise)
    y = torch.empty_like(x)
    noises = [None] * (-(-x.numel() // CHUNK)) if noise is None else noise.view(-1).split(CHUNK)
    for source, target, part in zip(x.view(-1).split(CHUNK), y.view(-1).split(CHUNK), noises, strict=True):
        target.copy_(reference.cast(source, *grid, part))
    return y


def encode(x: Tensor, mantissa: int, emin: int, first: int, bits: int, signed: bool, inf: int, nan: int) -> Tensor:
    """Codes in one pass, natively for formats of at most 8 bits."""
    layout = (mantissa, emin, first, bits, signed, inf, nan)
    x = x.contiguous() if x.dtype == torch.float64 else x.float().contiguous()
    fast = native.encode(x, *layout)
    if fast is not None:
        return fast
    codes = torch.empty(x.shape, dtype=code_dtype(bits))
    for source, target in zip(x.view(-1).split(CHUNK), codes.view(-1).split(CHUNK), strict=True):
        target.copy_(reference.encode(source, *layout))
    return codes


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """One pass over the codes, natively where the table is one of 8-bit codes in bfloat16."""
    codes = codes.contiguous()
    fast = native.decode(codes, table)
    return reference.decode(codes, table) if fast is None else fast


def quantize_rows(
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
    """One pass over every row, natively where possible."""
    fmt = RowFormat(mantissa, emin, low, high, flush, negative_zero, bits, nan)
    fast = native.quantize_rows(x, group, fmt, scale, zeros, affine, power_of_two)
    return reference.quantize_rows(x, group, scale, zeros, affine, power_of_two, *fmt) if fast is None else fast


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm``: VNNI or AMX. It wants its second operand as a transposed view, which ``b.T`` is."""
    if 0 in (*a.shape, *b.shape):
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    if a.shape[1] == 1:  # torch 2.13 cannot tell the one column from its transpose, and multiplies what is not there
        return torch.outer(a[:, 0].int(), b[:, 0].int())
    return torch._int_mm(a.contiguous(), b.contiguous().t())


def float_mm(a: Tensor, b: Tensor) -> Tensor:
    """The native BF16 GEMM with FP32 results where the processor has the instruction, else an FP32 matmul."""
    if a.dtype == b.dtype == torch.bfloat16:
        fast = native.float_mm(a, b)
        if fast is not None:
            return fast
    return reference.float_mm(a, b)


def scaled_mm(
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
    """Codes to results in one native kernel where the processor has the instructions."""
    fast = native.scaled_mm(a, b, left, right, stretch, a_table, b_table, zeros, bias, dtype)
    if fast is not None:
        return fast
    return reference.scaled_mm(a, b, left, right, stretch, a_table, b_table, zeros, bias, dtype)


def scale_sums(sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One pass, natively where possible."""
    fast = native.scale_sums(sums, left, right, bias, dtype)
    return reference.scale_sums(sums, left, right, bias, dtype) if fast is None else fast


def accumulate_mm(
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
    """One pass over registers, natively where possible."""
    inner = SumGrid(mantissa, emin, high, flush, infinite)
    outer = SumGrid(outer_mantissa, outer_emin, outer_high, outer_flush, outer_infinite)
    fast = accumulate.rounded(a, b, inner, outer, chunk, rounding, seed)
    return reference.accumulate_mm(a, b, *inner, chunk, *outer, rounding, seed) if fast is None else fast


def accumulate_mm_aligned(a: Tensor, b: Tensor, align: int, bits: int, promote: int) -> Tensor:
    """One pass over registers, natively where possible."""
    fast = accumulate.aligned(a, b, align, bits, promote)
    if fast is None:
        return reference.accumulate_mm_aligned(a, b, align, bits, promote)
    return reference.propagate(fast, a, b)


def accumulate_mm_integer(a: Tensor, b: Tensor, bits: int, saturate: bool) -> Tensor:
    """Saturating sums natively; a sum that wraps is the exact sum wrapped once, at the speed of a matmul."""
    if saturate:
        fast = accumulate.clamped(a, b, bits)
        return reference.accumulate_mm_integer(a, b, bits, saturate) if fast is None else fast
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int64)
    if 0 in (*a.shape, *b.shape):
        return total.int()
    largest = (float(a.abs().max()), float(b.abs().max()))
    if max(largest) <= 127:
        a, b, length, multiply = a.to(torch.int8), b.to(torch.int8), 1 << 16, int_mm
    else:  # float64 holds sums below 2**53 exactly, in any order
        a, b = a.double(), b.double()
        length, multiply = max(1, int(2**53 // max(1.0, largest[0] * largest[1]))), _double_mm
    for x, y in zip(a.split(length, 1), b.split(length, 1), strict=True):
        total = reference.wrap(total + multiply(x, y), bits)
    return total.int()


def _double_mm(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).long()


for _op in (
    *(cast, encode, decode, quantize_rows, int_mm, float_mm, scaled_mm, scale_sums),
    *(accumulate_mm, accumulate_mm_aligned, accumulate_mm_integer),
):
    LIBRARY.impl(_op.__name__, _op, "CPU")
