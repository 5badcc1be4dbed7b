"""The CPU's kernels: torch's integer GEMM, and our compiled cast and BF16 GEMM where this machine can run them.

Whatever cannot be served here goes to the law in ``reference.py``: slower, never different.
"""

import torch
from torch import Tensor

from octavo.ops import native, reference
from octavo.ops.schema import LIBRARY, code_dtype

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
    if x.dtype == torch.float16:  # exact in float32
        return cast(x.float(), *grid, noise).half()
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
    """Codes by cutting float32 bit patterns: a normal number's code is its upper bits with the bias exchanged."""
    if x.dtype == torch.float64 or emin <= -126 or bits > 16:
        return reference.encode(x, mantissa, emin, first, bits, signed, inf, nan)
    pattern = x.float().contiguous().view(torch.int32)
    magnitude = pattern & 0x7FFFFFFF
    size = magnitude.view(torch.float32)
    code = (magnitude >> (23 - mantissa)) - ((127 + emin - first) << mantissa)
    if first:
        code = code.where(size >= 2.0**emin, (size * 2.0 ** (mantissa - emin)).int())
    if inf >= 0:
        code = code.masked_fill_(magnitude == 0x7F800000, inf)
    if signed:
        code |= (pattern >> 31) & (1 << (bits - 1))
    if nan >= 0:
        missing = size.isnan()
        sign = 0 if nan == 1 << (bits - 1) else (pattern >> 31) & (int(signed) << (bits - 1))
        code = code.where(~missing, nan | sign)
    return code.to(code_dtype(bits))


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """One pass over the codes, natively where the table is one of 8-bit codes in bfloat16."""
    codes = codes.contiguous()
    fast = native.decode(codes, table)
    return reference.decode(codes, table) if fast is None else fast


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm``: VNNI or AMX. It wants its second operand as a transposed view, which ``b.T`` is."""
    if 0 in (*a.shape, *b.shape):
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    return torch._int_mm(a.contiguous(), b.contiguous().t())


def float_mm(a: Tensor, b: Tensor) -> Tensor:
    """The native BF16 GEMM with FP32 results where the processor has the instruction, else an FP32 matmul."""
    if a.dtype == b.dtype == torch.bfloat16:
        fast = native.gemm_bf16(a, b)
        if fast is not None:
            return fast
    return reference.float_mm(a, b)


for _op in (cast, encode, decode, int_mm, float_mm):
    LIBRARY.impl(_op.__name__, _op, "CPU")
