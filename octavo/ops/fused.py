"""The GPU's kernels of one pass, in Triton: cast, decode, rows to codes, sums to numbers.

They are what ``cast.c`` and ``rows.c`` are for the CPU, the same steps on the same bit patterns, so that all three
agree with ``reference.py`` to the last bit. Three things are said to the compiler for that: quotients are rounded as
IEEE 754 has it (``div_rn``), a product and a sum are never fused (``enable_fp_fusion``), and subnormals stay.

Triton comes with torch's builds for GPUs; ``cuda.py`` goes on without it. Its interpreter (``TRITON_INTERPRET=1``) runs
all of this on a CPU, which is how the tests do it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the source of a kernel, in which types are Triton's own.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.schema import RowFormat

TILE = 2048  # numbers that a program works on, where rows or groups are short
LONGEST = 16384  # and the most at a time, where they are long


@triton.jit
def _pow2(exponent):
    """2**exponent in float32, for exponents from -149 to 127."""
    normal = (exponent + 127) << 23
    subnormal = 1 << tl.minimum(tl.maximum(exponent + 149, 0), 23)
    return tl.where(exponent >= -126, normal, subnormal).to(tl.float32, bitcast=True)


@triton.jit
def _cast(
    source,
    target,
    noises,
    n,
    low,
    high,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    ROUNDING: tl.constexpr,
    OVERFLOW: tl.constexpr,
    FLUSH: tl.constexpr,
    NEGATIVE_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < n, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    u = bits & 0x7FFFFFFF
    field = u >> 23
    # |x| is significand · 2**lowest; the exponent of a subnormal one shows when it becomes a float again
    significand = (u & 0x7FFFFF) | tl.where(field > 0, 1 << 23, 0)
    lowest = tl.maximum(field, 1) - 150
    exponent = tl.where(field > 0, field - 127, (u.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 276)
    spacing = tl.where(exponent >= EMIN, exponent - MANTISSA, EMIN - (0 if FLUSH else MANTISSA))
    drop = tl.minimum(spacing - lowest, 25)  # beyond 25 it is less than half a step, and only that matters
    whole = significand >> drop
    rest = significand & ((1 << drop) - 1)
    if ROUNDING == "nearest-even":
        odd = whole & 1
        if MANTISSA == 0:  # the last bit of a power of two is that of its exponent field
            odd = odd & (exponent - EMIN + 1)
        up = 2 * rest + odd > (1 << drop)
    elif ROUNDING == "nearest-away":
        up = 2 * rest >= (1 << drop)
    elif ROUNDING == "up":
        up = (rest > 0) & (bits > 0)
    elif ROUNDING == "down":
        up = (rest > 0) & (bits < 0)
    elif ROUNDING == "stochastic":
        step = (tl.full((BLOCK,), 1023, tl.int64) - (spacing - lowest)) << 52
        noise = tl.load(noises + at, mask=at < n, other=0.0).to(tl.float64)
        up = rest.to(tl.float64) * step.to(tl.float64, bitcast=True) + noise >= 1
    else:
        up = rest < 0
    y = (whole + up.to(tl.int32)).to(tl.float32) * _pow2(spacing)
    y = tl.where(u == 0x7F800000, float("inf"), y)
    y = (y.to(tl.int32, bitcast=True) | (bits ^ u)).to(tl.float32, bitcast=True)  # Triton's -y is 0 - y: no -0
    over, under = y > high, (y < low) & (x < 0)
    bounded = tl.where(y > high, high, tl.where(y < low, low, y))
    if OVERFLOW == "saturate":
        y = bounded
    else:
        beyond = float("inf") if OVERFLOW == "inf" else float("nan")
        infinite = u == 0x7F800000
        highest = tl.where(infinite, beyond, high if ROUNDING == "toward-zero" or ROUNDING == "down" else beyond)
        lowest_of_all = tl.where(infinite, -beyond, low if ROUNDING == "toward-zero" or ROUNDING == "up" else -beyond)
        y = tl.where(over, highest, tl.where(under, lowest_of_all, bounded))
    if not NEGATIVE_ZERO:
        y = tl.where(y == 0, 0.0, y)
    y = tl.where(u > 0x7F800000, x, y)
    tl.store(target + at, y.to(target.dtype.element_ty), mask=at < n)


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
    noise: Tensor | None,
) -> Tensor:
    """``schema.cast`` of float32, bfloat16 or float16, for grids whose numbers float32 holds."""
    x = x.contiguous()
    y = torch.empty_like(x)
    noise = x if noise is None else noise.contiguous()
    settings = (mantissa, emin, rounding, overflow, flush, negative_zero)
    if x.numel():
        _cast[(triton.cdiv(x.numel(), TILE),)](
            x, y, noise, x.numel(), low, high, *settings, TILE, enable_fp_fusion=False
        )
    return y


@triton.jit
def _decode(codes, table, target, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + at, mask=at < n, other=0)
    tl.store(target + at, tl.load(table + code.to(tl.int32), mask=at < n), mask=at < n)


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """``schema.decode``."""
    codes = codes.contiguous()
    y = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    if y.numel():
        _decode[(triton.cdiv(y.numel(), TILE),)](codes, table.contiguous(), y, y.numel(), TILE)
    return y


@triton.jit
def _store_scale(scale, POWER_OF_TWO: tl.constexpr):
    """A scale as it is kept: a normal number, a power of two upwards if wanted."""
    u = scale.to(tl.int32, bitcast=True)
    if POWER_OF_TWO:
        u = (u + 0x7FFFFF) & 0x7F800000
    u = tl.where(u < 1 << 23, 1 << 23, u)
    u = tl.where(u > 0x7F7FFFFF, (254 << 23) if POWER_OF_TWO else 0x7F7FFFFF, u)
    return u.to(tl.float32, bitcast=True)


@triton.jit
def _integers(scaled, zero, low, high):
    """Codes of quotients, to nearest even, a zero point on top."""
    v = tl.where(scaled < -8.0e6, -8.0e6, scaled)
    v = tl.where(v > 8.0e6, 8.0e6, v)
    half = tl.where(v < 0, -8388608.0, 8388608.0)  # 2**23, above which float32 has only integers
    v = ((v + half) - half) + zero
    v = tl.where(v < low, low, v)
    v = tl.where(v > high, high, v)
    return tl.where(v == v, v, 0.0).to(tl.int32)


@triton.jit
def _floats(
    scaled,
    steps,
    least,
    MANTISSA: tl.constexpr,
    REBIAS: tl.constexpr,
    SHIFT: tl.constexpr,
    LAST: tl.constexpr,
    SIGN: tl.constexpr,
    NAN: tl.constexpr,
    NEGATIVE_ZERO: tl.constexpr,
):
    """Codes of quotients, to nearest even: adding half a step, less one where the number is even, rounds a pattern."""
    DROP: tl.constexpr = 23 - MANTISSA
    bits = scaled.to(tl.int32, bitcast=True)
    u = bits & 0x7FFFFFFF
    size = u.to(tl.float32, bitcast=True)
    odd = ((u >> DROP) - REBIAS) & 1
    normal = ((tl.minimum(u, 0x7F800000) + ((1 << (DROP - 1)) - 1 + odd)) >> DROP) - REBIAS
    count = tl.where(size < least, size * steps, 0.0)  # below the smallest normal number: of subnormal steps
    subnormal = ((count + 8388608.0) - 8388608.0).to(tl.int32) << SHIFT
    code = tl.minimum(tl.where(size < least, subnormal, normal), LAST)
    negative = tl.where(bits < 0, SIGN, 0)
    if not NEGATIVE_ZERO:
        negative = tl.where(code == 0, 0, negative)
    missing = u > 0x7F800000
    code = tl.where(missing, NAN, code)
    if NAN == SIGN:  # NaN stands in the place of -0, and has no sign
        negative = tl.where(missing, 0, negative)
    return code | negative


@triton.jit
def _quantize_rows(
    x,
    stride,
    given,
    given_zeros,
    codes,
    found,
    zeros,
    blocks,
    count,
    k,
    group,
    most,
    low,
    high,
    steps,
    least,
    GIVEN: tl.constexpr,  # 0: own scales; 1: one for all; 2: one a block
    AFFINE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTEGERS: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    MANTISSA: tl.constexpr,
    REBIAS: tl.constexpr,
    SHIFT: tl.constexpr,
    LAST: tl.constexpr,
    SIGN: tl.constexpr,
    NAN: tl.constexpr,
    NEGATIVE_ZERO: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    row, place = (block // count).to(tl.int64), block % count
    start = (place * group)[:, None]
    end = tl.minimum(start + group, k)
    source, target = x + (row * stride)[:, None], codes + (row * k)[:, None]

    if GIVEN != 1:
        top = tl.zeros((BLOCKS,), tl.int32)  # the largest magnitude as a pattern; what is not finite is above all
        lowest, highest = tl.zeros((BLOCKS,), tl.float32), tl.zeros((BLOCKS,), tl.float32)
        for first in range(0, group, WIDTH):
            at = start + first + tl.arange(0, WIDTH)[None, :]
            v = tl.load(source + at, mask=there[:, None] & (at < end), other=0.0).to(tl.float32)
            top = tl.maximum(top, tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
            if AFFINE or ONE_SIDED:
                lowest, highest = tl.minimum(lowest, tl.min(v, 1)), tl.maximum(highest, tl.max(v, 1))
        if GIVEN == 0:
            if AFFINE:
                spread = highest - lowest
            elif ONE_SIDED:
                spread = highest
            else:
                spread = top.to(tl.float32, bitcast=True)
            scale = tl.div_rn(tl.where(spread > 0, spread, 1e-12), tl.zeros((BLOCKS,), tl.float32) + most)
            if AFFINE:  # a range wider than the largest number
                wide = tl.zeros((BLOCKS,), tl.float32) + most
                scale = tl.where(scale < float("inf"), scale, tl.div_rn(highest, wide) - tl.div_rn(lowest, wide))
            scale = _store_scale(scale, POWER_OF_TWO)
        else:
            scale = tl.load(given + block, mask=there, other=1.0)
        scale = tl.where(top < 0x7F800000, scale, float("nan"))
        tl.store(found + block, scale, mask=there)
    else:
        scale = tl.zeros((BLOCKS,), tl.float32) + tl.load(given)

    zero = tl.zeros((BLOCKS,), tl.float32)
    if AFFINE:
        if GIVEN == 0:
            zero = low - _nearest(tl.div_rn(lowest, scale))
            zero = tl.where(zero < low, low, tl.where(zero > high, high, zero))
            zero = tl.where(zero == zero, zero, 0.0)
            tl.store(zeros + block, zero.to(tl.int32), mask=there)
        elif GIVEN == 1:
            zero = zero + tl.load(given_zeros).to(tl.float32)
        else:
            zero = tl.load(given_zeros + block, mask=there, other=0).to(tl.float32)

    for first in range(0, group, WIDTH):
        at = start + first + tl.arange(0, WIDTH)[None, :]
        inside = there[:, None] & (at < end)
        v = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.div_rn(v, tl.broadcast_to(scale[:, None], (BLOCKS, WIDTH)))
        if INTEGERS:
            code = _integers(scaled, zero[:, None], low, high)
        else:
            code = _floats(scaled, steps, least, MANTISSA, REBIAS, SHIFT, LAST, SIGN, NAN, NEGATIVE_ZERO)
        tl.store(target + at, code.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def _nearest(v):
    """The nearest integer, to even; what is 2**23 or more is one, or infinite."""
    half = tl.where(v < 0, -8388608.0, 8388608.0)
    return tl.where(tl.abs(v) < 8388608.0, (v + half) - half, v)


def quantize_rows(
    x: Tensor,
    group: int,
    fmt: RowFormat,
    scale: Tensor | None,
    zeros: Tensor | None,
    affine: bool,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``schema.quantize_rows``, or None if the kernel does not take this call."""
    integers = fmt.mantissa == 23
    served = fmt.bits <= 8 and (integers or (fmt.low < 0 and fmt.emin > -126 and fmt.emin - fmt.mantissa > -126))
    if not served or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.numel() == 0:
        return None
    (m, k), count = x.shape, -(-x.shape[1] // group)
    if scale is not None and not (
        scale.shape in ((m, count), (1, 1)) and (zeros is not None and zeros.shape == scale.shape) == affine
    ):
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty((m, k), dtype=torch.int8 if integers and fmt.low < 0 else torch.uint8, device=x.device)
    given, one = 0, scale is not None and scale.shape == (1, 1)
    if scale is None:
        found = torch.empty((m, count), dtype=torch.float32, device=x.device)
        points = torch.empty((m, count), dtype=torch.int32, device=x.device) if affine else None
    else:
        given = 1 if one else 2
        found = scale.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        points = None if zeros is None else zeros.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
    if one:  # what is not finite makes everything NaN
        least, most = torch.aminmax(x)
        found = found.where(least.isfinite() & most.isfinite(), float("nan"))
    width = min(triton.next_power_of_2(group), LONGEST)
    per_program = max(1, TILE // width)
    _quantize_rows[(triton.cdiv(m * count, per_program),)](
        x,
        x.stride(0),
        found,
        points,
        codes,
        found,
        points,
        m * count,
        count,
        k,
        group,
        fmt.high - fmt.low if affine else fmt.high,
        fmt.low,
        fmt.high,
        *_counting(fmt),
        given,
        affine,
        power_of_two,
        integers,
        fmt.low >= 0,
        *_pattern(fmt),
        per_program,
        width,
        num_warps=min(max(width * per_program // 512, 4), 16),
        enable_fp_fusion=False,
    )
    return codes, found, codes.new_empty((0, 0), dtype=torch.int32) if points is None else points


def _counting(fmt: RowFormat) -> tuple[float, float]:
    """How many smallest steps make 1, and the smallest normal number, under which steps are counted."""
    if fmt.mantissa == 23:
        return 0.0, 0.0
    return 2.0**-fmt.emin * (1 if fmt.flush else 2**fmt.mantissa), 2.0**fmt.emin


def _pattern(fmt: RowFormat) -> tuple[int | bool, ...]:
    """The settings of ``_floats``."""
    if fmt.mantissa == 23:
        return 0, 0, 0, 0, 0, 0, False
    exponent = max(math.frexp(fmt.high)[1] - 1, fmt.emin)
    last = int(math.ldexp(fmt.high, fmt.mantissa - exponent)) + ((exponent - fmt.emin) << fmt.mantissa)
    shift, sign = fmt.mantissa if fmt.flush else 0, 1 << (fmt.bits - 1)
    rebias = (126 + fmt.emin) << fmt.mantissa
    return fmt.mantissa, rebias, shift, last, sign, max(fmt.nan, 0), fmt.negative_zero


@triton.jit
def _scale_sums(
    sums,
    left,
    right,
    bias,
    target,
    m,
    n,
    left_step,
    right_step,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    wide = tl.cdiv(n, COLUMNS)
    row = tl.program_id(0) // wide * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % wide * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < m)[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    y = tl.load(sums + at, mask=inside, other=0).to(tl.float32)
    y = y * tl.load(left + row * left_step, mask=row < m)[:, None]
    y = y * tl.load(right + column * right_step, mask=column < n)[None, :]
    if BIAS:
        y = y + tl.load(bias + column, mask=column < n).to(tl.float32)[None, :]
    tl.store(target + at, y.to(target.dtype.element_ty), mask=inside)


def scale_sums(sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``schema.scale_sums``."""
    (m, n), rows, columns = sums.shape, 8, 256
    y = torch.empty((m, n), dtype=dtype, device=sums.device)
    left, right = left.reshape(-1).contiguous(), right.reshape(-1).contiguous()
    if y.numel():
        _scale_sums[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
            sums.contiguous(),
            left,
            right,
            left if bias is None else bias.contiguous(),
            y,
            m,
            n,
            int(left.numel() > 1),
            int(right.numel() > 1),
            bias is not None,
            rows,
            columns,
            enable_fp_fusion=False,
        )
    return y
