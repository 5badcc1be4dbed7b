"""The law: every operator in plain torch, written to be read, on any device. Faster kernels must equal these.

Arithmetic runs in float64, where every step is exact for grids that fit float32: dividing by a power of two, taking the
integer part, comparing the fraction with one half. Overflow follows IEEE 754: a value is rounded as if the exponent had
no upper bound, then compared with the limits; directed roundings toward zero stop at the limit.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.schema import LIBRARY, LONGEST, SumGrid, code_dtype


def pow2(exponent: Tensor) -> Tensor:
    """2**exponent in float64, exactly, for integer exponents within ±1022 (``torch.exp2`` promises less)."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def exponent_of(magnitude: Tensor, least: int) -> Tensor:
    """max(⌊log2 magnitude⌋, least), exactly; capped at 1000, far above any format: powers of two stay finite."""
    exponent = torch.frexp(magnitude)[1].long() - 1
    return exponent.where(magnitude > 0, least).clamp(least, 1000)


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
    """Round to a number grid; see ``schema.cast``."""
    exact = x.double().contiguous()
    magnitude = exact.abs()
    finite = magnitude.isfinite()
    magnitude = magnitude.where(finite, 0.0)

    exponent = exponent_of(magnitude, emin)
    spacing = exponent - mantissa
    if flush:
        spacing = spacing.where(magnitude >= 2.0**emin, emin)
    steps = magnitude * pow2(-spacing)
    whole = steps.floor()
    fraction = steps - whole
    negative = exact < 0

    if rounding == "nearest-even":
        odd = whole % 2 == 1
        if mantissa == 0:  # the last bit of a power of two is that of its exponent field
            odd = odd & ((exponent - emin) % 2 == 0)
        away = (fraction > 0.5) | ((fraction == 0.5) & odd)
    elif rounding == "nearest-away":
        away = fraction >= 0.5
    elif rounding == "toward-zero":
        away = torch.zeros_like(finite)
    elif rounding == "up":
        away = (fraction > 0) & ~negative
    elif rounding == "down":
        away = (fraction > 0) & negative
    elif rounding == "stochastic" and noise is not None:
        away = fraction + noise.double() >= 1
    else:
        raise ValueError(f"unknown rounding {rounding!r}, or stochastic rounding without noise")

    y = (whole + away) * pow2(spacing)
    y = y.where(finite, float("inf")).copysign(exact)
    y = _limit(y, exact, low, high, rounding, overflow)
    if not negative_zero:
        y = y + 0.0  # −0 + 0 = +0
    return y.where(~exact.isnan(), exact).to(x.dtype)


def _limit(y: Tensor, x: Tensor, low: float, high: float, rounding: str, overflow: str) -> Tensor:
    over, under = y > high, (y < low) & (x < 0)
    if overflow == "saturate":
        return y.clamp(low, high)
    beyond = float("inf") if overflow == "inf" else float("nan")
    stops_above = x.isfinite() & (rounding in ("toward-zero", "down"))
    stops_below = x.isfinite() & (rounding in ("toward-zero", "up"))
    y = y.where(~over, torch.full_like(y, beyond).where(~stops_above, high))
    y = y.where(~under, torch.full_like(y, -beyond).where(~stops_below, low))
    return y.where(y.isnan() | y.isinf(), y.clamp(low, high))  # a positive result below ``low``: a format without zero


def encode(x: Tensor, mantissa: int, emin: int, first: int, bits: int, signed: bool, inf: int, nan: int) -> Tensor:
    """Codes of values on a grid; see ``schema.encode``."""
    exact = x.double().contiguous()
    magnitude = exact.abs().where(exact.isfinite(), 0.0)
    exponent = exponent_of(magnitude, emin)
    # the significand as an integer, leading one included; the leading one adds itself to the exponent field
    significand = (magnitude * pow2(mantissa - exponent)).long()
    code = ((exponent - emin + first - 1) << mantissa) + significand
    if inf >= 0:
        code = code.where(~exact.isinf(), inf)
    code = code.where(~exact.isnan(), nan) if nan >= 0 else code
    if signed:
        sign = 1 << (bits - 1)
        negative = exact.signbit() & ~(exact.isnan() if nan == sign else torch.zeros_like(exact, dtype=torch.bool))
        code = code + negative * sign
    return code.to(code_dtype(bits))


def decode(codes: Tensor, table: Tensor) -> Tensor:
    """The values behind codes; see ``schema.decode``."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


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
    """Range, scale, round, encode; see ``schema.quantize_rows``."""
    (m, k), count = x.shape, -(-x.shape[1] // group)
    work = x.float()
    blocks = torch.nn.functional.pad(work, (0, count * group - k)).view(m, count, group)  # zeros change no range
    least, most = blocks.amin(2), blocks.amax(2)
    whole = least.isfinite() & most.isfinite()
    tiny, limits = 1e-12, torch.finfo(torch.float32)
    if scale is not None:
        whole = whole if scale.shape == whole.shape else whole.all().reshape(1, 1)
        found = scale.float()
    else:
        steps, least, most = high, least.clamp(max=0), most.clamp(min=0)
        spread = torch.maximum(-least, most) if low < 0 else most
        if affine:
            steps, spread = high - low, most - least
        found = spread.where(spread > 0, tiny) / steps
        found = found.where(found.isfinite(), most / steps - least / steps)
        if power_of_two:
            fraction, exponent = torch.frexp(found.clamp(limits.tiny, limits.max))
            found = pow2((exponent - (fraction == 0.5).int()).clamp(-149, 127)).float()
        found = found.clamp(limits.tiny, limits.max)
    found = found.where(whole, float("nan"))
    if affine and zeros is None:
        zeros = (low - (least / found).round()).nan_to_num(0.0).clamp(low, high).to(torch.int32)

    def spread_out(t: Tensor) -> Tensor:
        return t if t.shape == (1, 1) else t.repeat_interleave(group, 1)[:, :k]

    scaled, none = work / spread_out(found), torch.empty(0, 0, dtype=torch.int32, device=x.device)
    op = torch.ops.octavo
    if mantissa == 23:
        y = op.cast(scaled, 23, 23, -8.0e6, 8.0e6, "nearest-even", "saturate", False, False, None)
        y = (y if zeros is None else y + spread_out(zeros)).clamp(low, high).nan_to_num(0.0)
        codes = y.to(torch.int8 if low < 0 else torch.uint8)
    else:
        y = op.cast(scaled, mantissa, emin, low, high, "nearest-even", "saturate", flush, negative_zero, None)
        codes = op.encode(y, mantissa, emin, 1, bits, low < 0, -1, nan)
    return codes, found, none if zeros is None else zeros.clone()


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Integer matmul through float64, where sums below 2**53 are exact; see ``schema.int_mm``."""
    return (a.double() @ b.double().mT).to(torch.int32)


def float_mm(a: Tensor, b: Tensor) -> Tensor:
    """FP32 matmul of the same values; see ``schema.float_mm``."""
    with torch.autocast(a.device.type, enabled=False):  # which would round to bfloat16
        return a.float() @ b.float().mT


def scale_sums(sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Four steps, each rounded; see ``schema.scale_sums``."""
    y = sums.float() * left * right.mT
    return (y if bias is None else y + bias.float()).to(dtype)


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
    """Stretch after stretch, by the operators that multiply; see ``schema.scaled_mm``."""
    integers = b.dtype == torch.int8
    if not integers:
        a, b = (x if t is None else torch.ops.octavo.decode(x, t) for x, t in ((a, a_table), (b, b_table)))
    elif a.dtype == torch.uint8:  # 128 less, and so are their zeros
        a = (a.short() - 128).to(torch.int8)
        zeros = (torch.zeros_like(left, dtype=torch.int32) if zeros is None else zeros) - 128
    columns = [a, b, left, right, *([] if zeros is None else [zeros])]
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for s, start in enumerate(range(0, a.shape[1], stretch)):
        x, w = a[:, start : start + stretch], b[:, start : start + stretch]
        scale, other, *zero = (t[:, s : s + 1] if t.shape[1] > 1 else t for t in columns[2:])
        part = torch.ops.octavo.int_mm(x, w) if integers else torch.ops.octavo.float_mm(x, w)
        for z in zero:  # int64, for zeros may make sums larger than int32
            part = part.long() - z.long() * w.sum(1, dtype=torch.int64)
        if start + stretch >= a.shape[1] and start == 0:
            whole: Tensor = torch.ops.octavo.scale_sums(part, scale, other, bias, dtype)
            return whole
        part = torch.ops.octavo.scale_sums(part, scale, other, None, torch.float32)
        total = part if start == 0 else total.add_(part)
    return (total if bias is None else total + bias.float()).to(dtype)


def linear(
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
    *fmt: Any,
) -> Tensor:
    """``quantize_rows``, then ``scaled_mm``; see ``schema.linear``."""
    n, k = codes.shape
    if x.numel() == 0:
        return _no_products(x, n, bias)
    given, points = (None if t is None else t.reshape(1, 1) for t in (input_scale, input_zeros))
    numbers, left, zeros = torch.ops.octavo.quantize_rows(
        x.reshape(-1, k), group, given, points, affine, power_of_two, *fmt
    )
    stretch = min(LONGEST, k, *(size for size, t in ((group, left), (columns, scale)) if t.shape[1] > 1))
    if table is not None:
        numbers, codes = numbers.view(torch.uint8), codes.view(torch.uint8)
    y: Tensor = torch.ops.octavo.scaled_mm(
        numbers,
        codes,
        _along(left, group, k, stretch),
        _along(_every_row(scale, rows, n), columns, k, stretch),
        stretch,
        input_table,
        table,
        _along(zeros, group, k, stretch) if affine else None,
        bias,
        x.dtype,
    )
    return y.view(*x.shape[:-1], n)


def linear_weight_only(
    x: Tensor, codes: Tensor, scale: Tensor, rows: int, columns: int, table: Tensor | None, bias: Tensor | None
) -> Tensor:
    """BF16 by ``scaled_mm``, other inputs by a matmul in FP32 or FP64; see ``schema.linear_weight_only``."""
    assert table is not None
    n, k = codes.shape
    if x.numel() == 0:
        return _no_products(x, n, bias)
    codes, scale = codes.view(torch.uint8), _every_row(scale, rows, n)
    if x.dtype == torch.bfloat16:
        stretch = min(k, columns) if scale.shape[1] > 1 else k
        one, right = torch.ones(1, 1, device=x.device), _along(scale, columns, k, stretch)
        flat = x.reshape(-1, k)
        y: Tensor = torch.ops.octavo.scaled_mm(flat, codes, one, right, stretch, None, table, None, bias, x.dtype)
        return y.view(*x.shape[:-1], n)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = torch.ops.octavo.decode(codes, table).to(work) * _along(scale, columns, k, 1)
    with torch.autocast(x.device.type, enabled=False):  # as in float_mm
        return F.linear(x.to(work), weight, None if bias is None else bias.to(work)).to(x.dtype)


def _every_row(scale: Tensor, rows: int, n: int) -> Tensor:
    """A matrix's scales, one for every ``rows`` of its n rows, for each of them; or the one of all."""
    return scale if rows == 1 or scale.shape[0] == 1 else scale.repeat_interleave(rows, 0)[:n]


def _along(scale: Tensor, columns: int, k: int, stretch: int) -> Tensor:
    """A row's scales, one for every ``columns`` of k, for every stretch; or the one of all."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(columns // stretch, 1)[:, : -(-k // stretch)]


def _no_products(x: Tensor, n: int, bias: Tensor | None) -> Tensor:
    """The result where there is nothing to multiply."""
    y = x.new_zeros(*x.shape[:-1], n)
    return y if bias is None else y + bias.to(x.dtype)


def odd_sum(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` in float64, rounded to odd: if it is not exact, the neighbour whose last bit is one.

    Rounding this to at most 51 bits is rounding the exact sum, whatever the mode (Boldo and Melquiond, IEEE Trans.
    Computers 57(4), 2008): it lies on the same side of every such number and every tie. Knuth's TwoSum tells by how
    much the float64 sum is off.
    """
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    bits = total.view(torch.int64)
    odd = (bits + torch.where((error > 0) == (total > 0), 0, -1)) | 1
    return odd.where((error != 0) & total.isfinite(), bits).view(torch.float64)


def sum_noise(seed: int, m: int, n: int, device: torch.device) -> Callable[[int], Tensor]:
    """The noise of stochastic sums: from the number of an addition to float64 [m, n], multiples of 2**-24 in [0, 1).

    splitmix64 (Steele, Lea and Flood, OOPSLA 2014) started at a hash of seed, row and column; integers wrap.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as torch has it

    def mix(z: Tensor) -> Tensor:
        z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return z ^ (z >> 31 & 0x1FFFFFFFF)

    rows = mix(torch.arange(1, m + 1, device=device)[:, None] * golden + seed)
    keys = mix(rows + torch.arange(1, n + 1, device=device) * golden)
    return lambda number: (mix(keys + (number + 1) * torch.tensor(golden)) >> 40 & 0xFFFFFF).double() * 2.0**-24


def _round_sum(total: Tensor, grid: SumGrid, rounding: str, noise: Tensor | None) -> Tensor:
    """An odd sum on the grid; infinities stay, also where the grid has none."""
    mantissa, emin, high, flush, infinite = grid
    y = total
    if rounding == "stochastic":  # 24 random bits meet 24 bits of the fraction: what lies below cannot carry
        y = cast(y, mantissa + 24, emin, -(2.0**999), 2.0**999, "toward-zero", "saturate", False, True)
    y = cast(y, mantissa, emin, -high, high, rounding, "inf" if infinite else "saturate", flush, True, noise)
    return y.where(~total.isinf(), total)


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
    """One product and one rounding at a time; see ``schema.accumulate_mm``."""
    (m, k), n = a.shape, b.shape[0]
    inner = SumGrid(mantissa, emin, high, flush, infinite)
    outer = SumGrid(outer_mantissa, outer_emin, outer_high, outer_flush, outer_infinite)
    noise = sum_noise(seed, m, n, a.device) if rounding == "stochastic" else None
    left, right = a.double().unbind(1), b.double().unbind(1)
    total = partial = torch.zeros(m, n, dtype=torch.float64, device=a.device)
    for i in range(k):
        product = left[i][:, None] * right[i]  # exact: 24 bits times 24 bits
        partial = _round_sum(odd_sum(partial, product), inner, rounding, noise and noise(i))
        if chunk and ((i + 1) % chunk == 0 or i + 1 == k):
            total = _round_sum(odd_sum(total, partial), outer, rounding, noise and noise(k + i // chunk))
            partial = torch.zeros_like(total)
    return ((total if chunk else partial) + 0.0).float()  # −0 + 0 = +0


def accumulate_mm_aligned(a: Tensor, b: Tensor, align: int, bits: int, promote: int) -> Tensor:
    """Align, truncate, add, for every group; see ``schema.accumulate_mm_aligned``."""
    (m, k), n = a.shape, b.shape[0]
    left, right = a.double().unbind(1), b.double().unbind(1)
    total = torch.zeros(m, n, dtype=torch.float32, device=a.device)
    promote = promote or max(k, 1)
    for first in range(0, k, promote):
        partial = torch.zeros(m, n, dtype=torch.float64, device=a.device)
        end = min(first + promote, k)
        for start in range(first, end, align):
            group = range(start, min(start + align, end))
            peak = partial.abs()
            for i in group:
                peak = peak.maximum((left[i][:, None] * right[i]).abs())
            lowest = exponent_of(peak, -400) - (bits - 1)
            units = (partial * pow2(-lowest)).trunc()
            for i in group:
                units += (left[i][:, None] * right[i] * pow2(-lowest)).trunc()
            partial = units * pow2(lowest)
        total += partial.float()
    return propagate(total, a, b)


def propagate(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total`` with what IEEE 754 says where a row of ``a`` or ``b`` holds an infinity or NaN."""
    rows, columns = ~a.isfinite().all(1), ~b.isfinite().all(1)
    if rows.any() or columns.any():
        total = total.where(~(rows[:, None] | columns), (a.double() @ b.double().mT).float())
    return total


def accumulate_mm_integer(a: Tensor, b: Tensor, bits: int, saturate: bool) -> Tensor:
    """In int64, one product at a time; see ``schema.accumulate_mm_integer``."""
    left, right = a.long().unbind(1), b.long().unbind(1)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int64, device=a.device)
    for x, y in zip(left, right, strict=True):
        total = total + x[:, None] * y
        total = total.clamp(-(1 << bits - 1), (1 << bits - 1) - 1) if saturate else wrap(total, bits)
    return total.int()


def wrap(x: Tensor, bits: int) -> Tensor:
    """int64 to two's complement of ``bits``."""
    half = 1 << bits - 1
    return ((x + half) & (2 * half - 1)) - half


LIBRARY.impl("linear_by_steps", linear, "CompositeExplicitAutograd")
LIBRARY.impl("linear_weight_only_by_steps", linear_weight_only, "CompositeExplicitAutograd")
for _op in (
    *(cast, encode, decode, quantize_rows, int_mm, float_mm, scaled_mm, scale_sums, linear, linear_weight_only),
    *(accumulate_mm, accumulate_mm_aligned, accumulate_mm_integer),
):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
