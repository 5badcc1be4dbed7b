"""The product of two quantized matrices, computed on their codes.

A scale that does not vary along K moves out of the sum, so the inner product runs on small exact numbers: integers on
integer units, everything else as BF16 with FP32 accumulation, where products of 8-bit formats are exact. Scales that
do vary along K cut it into stretches over which both operands' scales are constant; each stretch is multiplied so and
the results are added in FP32, as DeepSeek-V3 (2412.19437) does every 128.

Zero points come out of the sum as well: ``Σ(x − z)(w − u) = Σxw − zΣw − uΣx + Kzu`` (1712.05877).

Any other accumulator of ``octavo.accumulate`` sees the unscaled numbers too (``codes − zero_point``), one stretch at a
time from zero: chunks, groups and promotions are counted from the start of each stretch, and stretches are scaled and
added in FP32. An operand left as it is has one scale, 1.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, overload

import torch
from torch import Tensor

from octavo import ops
from octavo.core.accumulate import FP32, Accumulator, Float32, Integer, sum_products
from octavo.core.cast import Cast, quantize_unchecked
from octavo.core.formats import FloatFormat, IntegerFormat
from octavo.core.granularity import expand_blocks
from octavo.core.qtensor import QTensor
from octavo.errors import OctavoError

LONGEST = ops.schema.LONGEST  # integers at a time


def matmul(
    a: "Tensor | QTensor",
    b: "Tensor | QTensor",
    lhs: Cast | None = None,
    rhs: Cast | None = None,
    accumulate: Accumulator = FP32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``a @ b`` with each operand in its own 8 bits: a […, M, K], b [K, N] or […, K, N]; the result is [… , M, N].

    ``lhs`` and ``rhs`` say how to quantize operands that are not QTensors yet; an operand with neither stays as it is.
    ``accumulate`` says how products are added (see ``octavo.accumulate``); under ``FP32`` a product with an operand
    left as it is is an ordinary one of dequantized values. ``generator`` serves all stochastic rounding. The result has
    ``a``'s dtype, from FP32 sums.

    Gradients pass straight through casts and accumulator: ``∂a = g @ dequantized(b).mT`` and
    ``∂b = dequantized(a).mT @ g``, in FP32.

    Raises ``OctavoError`` for shapes that do not fit, for operands that are not floating-point (or, with an emulated
    accumulator, float64), and for an ``Integer`` accumulator unless both operands are cast to integers.
    """
    if not isinstance(accumulate, Accumulator):
        raise OctavoError(f"accumulate is one of octavo.accumulate's, such as accumulate.FP32, not {accumulate!r}")
    left, right = _operand(a, lhs, accumulate, generator), _operand(b, rhs, accumulate, generator)
    batch = _batch(left, right)
    tensors = [x if isinstance(x, Tensor) else None for x in (a, b)]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        quantized = [None if isinstance(q, Tensor) else q for q in (left, right)]
        result: Tensor = _StraightThrough.apply(*tensors, *quantized, batch, accumulate, generator)
        return result
    return _matmul(left, right, batch, accumulate, generator)


def _matmul(
    a: Tensor | QTensor, b: Tensor | QTensor, batch: torch.Size, how: Accumulator, generator: torch.Generator | None
) -> Tensor:
    dtype = a.dtype
    if isinstance(how, Float32) and (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return _dense(a, dtype) @ _dense(b, dtype)
    shape = (*batch, a.shape[-2], b.shape[-1])
    if len(b.shape) == 2:
        rows = a if len(a.shape) == 2 else _rows(a)
        return _product(rows, b.mT, how, generator).reshape(shape).to(dtype)
    result = torch.empty(shape, dtype=torch.float32, device=a.device)
    for place, x, y in zip(_places(batch), _batches(a, batch), _batches(b, batch), strict=True):
        result[place] = _product(x, y.mT, how, generator)
    return result.to(dtype)


def _product(a: Tensor | QTensor, b: Tensor | QTensor, how: Accumulator, generator: torch.Generator | None) -> Tensor:
    """``a @ b.T`` of [M, K] and [N, K] in float32, with any accumulator."""
    if isinstance(how, Float32) and isinstance(a, QTensor) and isinstance(b, QTensor):
        return multiply(a, b)
    x, w = (t.float() if isinstance(t, Tensor) else t.numbers() for t in (a, b))
    k, quantized = a.shape[1], [q for q in (a, b) if isinstance(q, QTensor)]
    edges = sorted({k, 0}.union(*(range(0, k, q.block[1] or 1) for q in quantized)))
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for start, stop in pairwise(edges):
        part = sum_products(x[:, start:stop], w[:, start:stop], how, generator)
        if isinstance(a, QTensor):
            part = part.mul_(column(a.scale, a, start))
        if isinstance(b, QTensor):
            part = part.mul_(column(b.scale, b, start).mT)
        total = part if start == 0 else total.add_(part)
    return total


class _StraightThrough(torch.autograd.Function):
    """The product of what was quantized; the gradient of the product of what it stands for."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor | None,
        b: Tensor | None,
        left: QTensor | None,
        right: QTensor | None,
        batch: torch.Size,
        how: Accumulator,
        generator: torch.Generator | None,
    ) -> Tensor:
        ctx.save_for_backward(a if left is None else None, b if right is None else None)
        ctx.quantized = (left, right)
        ctx.like = tuple(None if x is None else (x.shape, x.dtype) for x in (a, b))
        x, y = (t if q is None else q for t, q in ((a, left), (b, right)))
        assert x is not None
        assert y is not None
        return _matmul(x, y, batch, how, generator)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        work = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        g = gradient.to(work)
        a, b = (_dense(t if q is None else q, work) for t, q in zip(ctx.saved_tensors, ctx.quantized, strict=True))
        grads: list[Tensor | None] = [None] * 7
        with full_precision(g.device.type):
            if ctx.needs_input_grad[0]:
                shape, dtype = ctx.like[0]
                grads[0] = (g @ b.mT).sum_to_size(shape).to(dtype)
            if ctx.needs_input_grad[1]:
                shape, dtype = ctx.like[1]
                if len(shape) == 2 and a.dim() > 2:  # one product instead of a batch of them and its sum
                    a, g = a.expand(*g.shape[:-2], *a.shape[-2:]).flatten(0, -2), g.flatten(0, -2)
                grads[1] = (a.mT @ g).sum_to_size(shape).to(dtype)
        return tuple(grads)


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Autocast, which would round the operands of a product to 16 bits, is off within."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _operand(
    x: Tensor | QTensor, cast: Cast | None, how: Accumulator, generator: torch.Generator | None
) -> Tensor | QTensor:
    """One operand as the product takes it, quantized if it is to be."""
    if not isinstance(x, Tensor | QTensor):
        raise OctavoError(f"matmul takes tensors and QTensors, not {type(x).__name__}; convert it first")
    if not isinstance(cast, Cast | None):
        raise OctavoError(f"lhs and rhs are Casts, such as octavo.Cast('E4M3FN'), or None, not {cast!r}")
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise OctavoError(f"matmul takes floating-point tensors and QTensors, not {x.dtype}; convert it first")
        x = x if cast is None else quantize_unchecked(x, cast, generator=generator)
    if isinstance(how, Integer) and (isinstance(x, Tensor) or not isinstance(x.format, IntegerFormat)):
        name = x.dtype if isinstance(x, Tensor) else x.format.name
        raise OctavoError(f"an Integer accumulator adds integers, not {name}; cast both operands to INT8 or the like")
    if isinstance(x, Tensor) and x.dtype == torch.float64 and not isinstance(how, Float32):
        raise OctavoError("accumulators are emulated for operands of at most 24 bits, not float64; convert to float32")
    return x


def _batch(a: Tensor | QTensor, b: Tensor | QTensor) -> torch.Size:
    """The leading dimensions of the product."""
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[-1] != b.shape[-2]:
        raise OctavoError(f"matmul of {list(a.shape)} and {list(b.shape)}: it needs […, M, K] and […, K, N]")
    try:
        batch: torch.Size = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError as error:
        raise OctavoError(f"matmul of {list(a.shape)} and {list(b.shape)}: leading dimensions do not fit") from error
    return batch


def _dense(x: Tensor | QTensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) else x.dequantize(dtype)


def multiply(a: QTensor, b: QTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``a @ b.T + bias`` of a [M, K] and b [N, K], in ``dtype``: the product of a layer's input and its weight.

    Exact products and FP32 sums for formats of at most 8 bits; wider ones multiply in FP32, where products round too.
    ``bias`` [N] is added in FP32, before the one rounding to ``dtype``.
    """
    k = a.shape[1]
    integers = all(isinstance(q.format, IntegerFormat) and q.format.bits <= 8 for q in (a, b))
    exact = a.format.exact_in_bfloat16 and b.format.exact_in_bfloat16
    sizes = [q.block[1] for q in (a, b) if q.scale.shape[1] > 1]  # of the blocks along K, where there are several
    stretch = min([*sizes, LONGEST, max(k, 1)])
    if not any(size % stretch for size in sizes):
        left, right = (_along(q.scale, q, stretch) for q in (a, b))
        if integers and b.zero_point is None and b.codes.dtype == torch.int8:
            zeros = None if a.zero_point is None else _along(a.zero_point, a, stretch)
            return ops.scaled_mm(a.codes, b.codes, left, right, stretch, zeros=zeros, bias=bias, dtype=dtype)
        if exact and not integers:
            (x, x_table), (w, w_table) = _sixteen_bits(a), _sixteen_bits(b)
            return ops.scaled_mm(x, w, left, right, stretch, x_table, w_table, None, bias, dtype)
    if integers:
        (x, zx), (w, zw) = signed_codes(a), signed_codes(b)
    else:
        (x, zx), (w, zw) = ((q.numbers(torch.bfloat16 if exact else torch.float32), None) for q in (a, b))
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for start, stop in pairwise(sorted({0, k}.union(*(range(0, k, size) for size in (*sizes, LONGEST))))):
        left, right = x[:, start:stop], w[:, start:stop]
        if integers:
            sums = integer_sums(left, right, column(zx, a, start), column(zw, b, start))
        else:
            sums = ops.float_mm(left, right)
        number = ops.scale_sums(sums, column(a.scale, a, start), column(b.scale, b, start))
        total = number if start == 0 else total.add_(number)
    return (total if bias is None else total + bias.float()).to(dtype)


def _along(values: Tensor, q: QTensor, stretch: int) -> Tensor:
    """A matrix's scales (or zero points) for every row, or the one of all, and every stretch of columns."""
    if values.shape[0] > 1:
        values = expand_blocks(values, (q.shape[0], values.shape[1]), (q.block[0], 1))
    if values.shape[1] > 1 and q.block[1] > stretch:
        values = values.repeat_interleave(q.block[1] // stretch, 1)[:, : -(-q.shape[1] // stretch)]
    return values


def _sixteen_bits(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """A matrix as bfloat16, or as bytes with the bfloat16 that each stands for."""
    if isinstance(q.format, FloatFormat) and q.format.bits == 8:
        return q.codes, q.format.table_in(torch.bfloat16, q.device)
    if q.codes.dtype == torch.int8 and q.zero_point is None:
        return q.codes.view(torch.uint8), _integers(q.device)
    return q.numbers(torch.bfloat16), None


@lru_cache(maxsize=8)
def _integers(device: torch.device) -> Tensor:
    """What a byte stands for as two's complement."""
    return torch.arange(256, dtype=torch.uint8).view(torch.int8).to(device, torch.bfloat16)


def integer_sums(x: Tensor, w: Tensor, zx: Tensor | None, zw: Tensor | None) -> Tensor:
    """``(x − zx) @ (w − zw).T`` of int8 codes, exactly: int32, or int64 where zero points make it larger."""
    total = ops.int_mm(x, w)
    if zx is None and zw is None:
        return total
    total = total.long()
    if zx is not None:
        total -= zx.long() * w.sum(1, dtype=torch.int64)
    if zw is not None:
        total -= x.sum(1, keepdim=True, dtype=torch.int64) * zw.long().mT
    if zx is not None and zw is not None:
        total += x.shape[1] * zx.long() * zw.long().mT
    return total


def signed_codes(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """Codes as int8, and their zero point: unsigned codes move down by 128, and so does their zero point."""
    if q.codes.dtype == torch.int8:
        return q.codes, q.zero_point
    moved = (q.codes.short() - 128).to(torch.int8)
    zero_point = torch.zeros_like(q.scale, dtype=torch.int32) if q.zero_point is None else q.zero_point
    return moved, zero_point - 128


@overload
def column(values: Tensor, q: QTensor, start: int) -> Tensor: ...
@overload
def column(values: None, q: QTensor, start: int) -> None: ...
def column(values: Tensor | None, q: QTensor, start: int) -> Tensor | None:
    """The scales (or zero points) that hold from column ``start`` on, [rows, 1] or [1, 1]."""
    if values is None:
        return None
    index = start // q.block[1] if values.shape[1] > 1 else 0
    found = values[:, index : index + 1]
    return expand_blocks(found, (q.shape[0], 1), (q.block[0], 1)) if found.shape[0] > 1 else found


def _rows(q: Tensor | QTensor) -> Tensor | QTensor:
    """A batched operand as one matrix, every row with its own scale."""
    if isinstance(q, Tensor):
        return q.flatten(0, -2)

    def spread(t: Tensor) -> Tensor:
        wide = expand_blocks(t, (*q.shape[:-1], t.shape[-1]), (*q.block[:-1], 1))
        return wide.expand(*q.shape[:-1], -1).flatten(0, -2)

    zeros = None if q.zero_point is None else spread(q.zero_point)
    return QTensor(q.codes.flatten(0, -2), spread(q.scale), zeros, q.format, (1, q.block[-1]), q.dtype)


def _batches(q: Tensor | QTensor, batch: torch.Size) -> Iterator[Tensor | QTensor]:
    """The matrices of a batched operand, broadcast to ``batch``: views, for there may be many of few."""

    def spread(t: Tensor) -> Tensor:
        return t.expand(*batch, *t.shape[-2:])

    if isinstance(q, Tensor):
        whole = spread(q)
        yield from (whole[place] for place in _places(batch))
        return
    lead, codes = q.shape[:-2], spread(q.codes)
    scale, zeros = (
        None if t is None else spread(expand_blocks(t, (*lead, *t.shape[-2:]), (*q.block[:-2], 1, 1)))
        for t in (q.scale, q.zero_point)
    )
    assert scale is not None
    for place in _places(batch):
        zero = None if zeros is None else zeros[place]
        yield QTensor(codes[place], scale[place], zero, q.format, q.block[-2:], q.dtype)


def _places(batch: torch.Size) -> Iterator[tuple[int, ...]]:
    return product(*map(range, batch))
