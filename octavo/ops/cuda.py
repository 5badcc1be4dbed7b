"""The GPU's kernels: torch's GEMMs of integers, FP8 and BF16, between the kernels of one pass in ``fused.py``.

Casts, codes, scales and integer products equal the law bit for bit. FP8 runs on FP8 units where codes are E4M3FN or
E5M2 (not both E5M2, which no unit multiplies) and sizes are multiples of 16: products are exact, but a Hopper adds 32
of them with 14 bits and moves to FP32 every 128 (DeepSeek-V3, 2412.19437): a sum is within ``FLOAT8_ERROR`` ·
|a| @ |b|.T. Any other format runs as BF16, within the bound of FP32.

Torch's FP8 products take one scale, a scale a row, or one for every 128 of K, each on some GPUs and with some versions
of CUDA: each way is tried once on a small product, and not taken where it fails. A CUDA graph is captured after a first
call, as torch asks for anyway.
"""

from functools import lru_cache
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from octavo.ops import reference
from octavo.ops.schema import LIBRARY, RowFormat

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOAT8_ERROR = 2.0**-5  # 4 times 33 numbers cut off at 2**-13 of the largest, rounded up
CAST = (torch.float32, torch.bfloat16, torch.float16)

#: Which scales torch's FP8 product applies itself; "sums": none, its result is FP32.
Way = Literal["tensor", "row", "block", "sums"]


@lru_cache(maxsize=1)
def _fused() -> ModuleType | None:
    """The Triton kernels, or None where there is no Triton."""
    try:
        from octavo.ops import fused
    except ImportError:
        return None
    return fused


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
    """One pass, where float32 holds the grid; else the law."""
    grid = (mantissa, emin, low, high, rounding, overflow, flush, negative_zero)
    held = 0 <= mantissa <= 23 and emin - mantissa >= -149 and emin - (0 if flush else mantissa) <= 127
    held = held and low <= high and high > 0 and all(float(np.float32(end)) == end for end in (low, high))
    known = rounding != "stochastic" or (noise is not None and noise.shape == x.shape)
    fused = _fused()
    if fused is None or not held or not known or x.dtype not in CAST:
        return reference.cast(x, *grid, noise)
    with torch.cuda.device_of(x):
        y: Tensor = fused.cast(x, *grid, noise)
    return y


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """One pass."""
    fused = _fused()
    if fused is None:
        return reference.decode(codes, table)
    with torch.cuda.device_of(codes):
        y: Tensor = fused.decode(codes, table)
    return y


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
    """One pass over every row, where the kernel takes the format."""
    fused, fmt = _fused(), RowFormat(mantissa, emin, low, high, flush, negative_zero, bits, nan)
    if fused is not None:
        with torch.cuda.device_of(x):
            found: tuple[Tensor, Tensor, Tensor] | None = fused.quantize_rows(
                x, group, fmt, scale, zeros, affine, power_of_two
            )
        if found is not None:
            return found
    return reference.quantize_rows(x, group, scale, zeros, affine, power_of_two, *fmt)


def scale_sums(sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One pass."""
    fused = _fused()
    if fused is None:
        return reference.scale_sums(sums, left, right, bias, dtype)
    with torch.cuda.device_of(sums):
        y: Tensor = fused.scale_sums(sums, left, right, bias, dtype)
    return y


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm``, padded with zeros to the sizes cuBLAS takes: M above 16, K and N multiples of 8."""
    (m, k), n = a.shape, b.shape[0]
    if 0 in (m, k, n):
        return a.new_zeros((m, n), dtype=torch.int32)
    a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n].contiguous()


def float_mm(a: Tensor, b: Tensor) -> Tensor:
    """BF16 on cuBLAS with an FP32 result, or FP8 where ``scaled_mm`` asks for it; float32 multiplies as it is."""
    if a.dtype in FLOAT8:
        if _offers("sums", a.device):
            one = torch.ones(1, 1, device=a.device)
            return float8_mm("sums", a, b, one, one, None, torch.float32)
        a, b = a.bfloat16(), b.bfloat16()
    if a.dtype == b.dtype == torch.bfloat16 and 0 not in (*a.shape, *b.shape):
        with torch.autocast("cuda", enabled=False):  # which may be one to float16
            return torch.mm(a, b.mT, out_dtype=torch.float32)
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
    """On FP8 units where they take it, with the scales that they apply; else by the operators that multiply."""
    (m, k), n = a.shape, b.shape[0]
    if 0 not in (m, n, k) and k % 16 == n % 16 == 0 and (k <= stretch or stretch % 16 == 0):
        kinds = [None if t is None else _float8_of(t) for t in (a_table, b_table)]
        if None not in kinds and kinds != [torch.float8_e5m2] * 2:
            x, w = (codes.view(kind) for codes, kind in zip((a, b), kinds, strict=True) if kind is not None)
            way: Way = "block" if k > stretch else "tensor" if left.numel() == right.numel() == 1 else "row"
            alike = dtype == torch.bfloat16 and (bias is None or bias.dtype == dtype)
            if alike and (way != "block" or (stretch == 128 and k % 128 == 0)) and _offers(way, a.device):
                return float8_mm(way, x, w, left, right, bias, dtype)
            return reference.scaled_mm(x, w, left, right, stretch, None, None, None, bias, dtype)
    return reference.scaled_mm(a, b, left, right, stretch, a_table, b_table, zeros, bias, dtype)


def float8_mm(
    way: Way, a: Tensor, b: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``torch._scaled_mm`` of FP8 [M, K] and [N, K], scales as in ``schema.scaled_mm`` laid out as each way wants."""
    m, n = a.shape[0], b.shape[0]
    a, b = (t if t.stride(1) == 1 and t.stride(0) % 16 == 0 else t.contiguous() for t in (a, b))
    if way == "tensor" or way == "sums":
        scales = left.reshape(()), right.reshape(())
    elif way == "row":  # [M, 1] and [1, N]
        scales = left.expand(m, 1).contiguous(), right.expand(n, 1).contiguous().t()
    else:  # [M, K/128] and [K/128, N], both with neighbours along M and N side by side
        count = a.shape[1] // 128
        scales = left.expand(m, count).t().contiguous().t(), right.expand(n, count).t().contiguous()
    return torch._scaled_mm(a, b.t(), *scales, bias=bias, out_dtype=dtype)


@lru_cache(maxsize=64)
def _offers(way: Way, device: torch.device) -> bool:
    """Whether this torch and this GPU multiply FP8 in this way, tried once."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 2, (rows, 256), generator=generator) * 2.0 - 1 for rows in (32, 48))
    counts = {"tensor": (1, 1, 1), "row": (32, 48, 1), "block": (32, 48, 2), "sums": (1, 1, 1)}[way]
    left, right = (2.0 ** torch.randint(0, 4, (rows, counts[2]), generator=generator) for rows in counts[:2])
    if way == "sums":
        left, right = torch.ones(1, 1), torch.ones(1, 1)
    wide = 256 // counts[2]
    expected = (a * left.repeat_interleave(wide, 1)) @ (b * right.repeat_interleave(wide, 1)).T
    x, w = (t.to(device, torch.float8_e4m3fn) for t in (a, b))
    dtype = torch.float32 if way == "sums" else torch.bfloat16
    try:
        y = float8_mm(way, x, w, left.to(device), right.to(device), None, dtype).float().cpu()
    except (RuntimeError, ValueError):  # what torch or cuBLAS says where there is no such product
        return False
    return torch.allclose(y, expected, rtol=0.01, atol=0.01)


_KINDS = WeakTensorKeyDictionary()


def _float8_of(table: Tensor) -> torch.dtype | None:
    """Torch's name of the 8-bit format whose values these are, if it has one; looked up once a table."""
    if table not in _KINDS:
        values, every = table.cpu(), torch.arange(256, dtype=torch.uint8)
        known = [
            t for t in FLOAT8 if torch.equal(values.nan_to_num(0.5), every.view(t).to(values.dtype).nan_to_num(0.5))
        ]
        _KINDS[table] = known[0] if known else None
    kind: torch.dtype | None = _KINDS[table]
    return kind


for _op in (cast, decode, quantize_rows, int_mm, float_mm, scaled_mm, scale_sums):
    LIBRARY.impl(_op.__name__, _op, "CUDA")
