"""The product of two quantized matrices, computed on their codes.

A scale that does not vary along K moves out of the sum, so the inner product runs on small exact numbers: integers on
integer units, everything else as BF16 with FP32 accumulation, where products of 8-bit formats are exact. Scales that
do vary along K cut it into stretches over which both operands' scales are constant; each stretch is multiplied so and
the results are added in FP32, as DeepSeek-V3 (2412.19437) does every 128.

Zero points come out of the sum as well: ``Σ(x − z)(w − u) = Σxw − zΣw − uΣx + Kzu`` (1712.05877).
"""

from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from octavo import ops
from octavo.core.cast import Cast, quantize_unchecked
from octavo.core.formats import IntegerFormat
from octavo.core.granularity import expand_blocks
from octavo.core.qtensor import QTensor
from octavo.errors import OctavoError

LONGEST = 1 << 16  # integers at a time: 2**16 · 128² < 2**31, so no int32 sum overflows


def matmul(a: "Tensor | QTensor", b: "Tensor | QTensor", lhs: Cast | None = None, rhs: Cast | None = None) -> Tensor:
    """``a @ b`` with each operand in its own 8 bits: a […, M, K], b [K, N] or […, K, N]; the result is [… , M, N].

    ``lhs`` and ``rhs`` say how to quantize operands that are not QTensors yet; an operand with neither stays as it is,
    and the product is then an ordinary one of dequantized values. The result has ``a``'s dtype, from FP32 sums.
    """
    a = quantize_unchecked(a, lhs) if isinstance(a, Tensor) and lhs is not None else a
    b = quantize_unchecked(b, rhs) if isinstance(b, Tensor) and rhs is not None else b
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[-1] != b.shape[-2]:
        raise OctavoError(f"matmul of {list(a.shape)} and {list(b.shape)}: it needs […, M, K] and […, K, N]")
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        dtype = a.dtype
        a, b = (t if isinstance(t, Tensor) else t.dequantize(dtype) for t in (a, b))
        return a @ b.to(dtype)
    dtype = a.dtype
    if len(a.shape) == 2 and len(b.shape) == 2:
        return multiply(a, b.mT).to(dtype)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left, right = _batches(a, batch), _batches(b, batch)
    products = [multiply(x, y.mT) for x, y in zip(left, right, strict=True)]
    shape = (*batch, a.shape[-2], b.shape[-1])
    return (torch.stack(products) if products else torch.empty(0, device=a.device)).view(shape).to(dtype)


def multiply(a: QTensor, b: QTensor) -> Tensor:
    """``a @ b.T`` of a [M, K] and b [N, K], in float32: the product of a layer's input and its weight.

    Exact products and FP32 sums for formats of at most 8 bits; wider ones multiply in FP32, where products round too.
    """
    integers = all(isinstance(q.format, IntegerFormat) and q.format.bits <= 8 for q in (a, b))
    exact = a.format.exact_in_bfloat16 and b.format.exact_in_bfloat16
    (m, k), n = a.shape, b.shape[0]
    if integers:
        (x, zx), (w, zw) = _signed(a), _signed(b)
    else:
        (x, zx), (w, zw) = ((q.numbers(torch.bfloat16 if exact else torch.float32), None) for q in (a, b))
    total: Tensor | None = None
    edges = sorted({*range(0, k, a.block[1] or 1), *range(0, k, b.block[1] or 1), *range(0, k, LONGEST), k})
    for start, stop in pairwise(edges):
        left, right = x[:, start:stop], w[:, start:stop]
        if integers:
            product = _integer(left, right, _column(zx, a, start), _column(zw, b, start)).float()
        else:
            product = ops.float_mm(left, right)
        product = product.mul_(_column(a.scale, a, start)).mul_(_column(b.scale, b, start).mT)
        total = product if total is None else total.add_(product)
    return torch.zeros(m, n, dtype=torch.float32, device=a.device) if total is None else total


def _integer(x: Tensor, w: Tensor, zx: Tensor | None, zw: Tensor | None) -> Tensor:
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


def _signed(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """Codes as int8, and their zero point: unsigned codes move down by 128, and so does their zero point."""
    if q.codes.dtype == torch.int8:
        return q.codes, q.zero_point
    moved = (q.codes.short() - 128).to(torch.int8)
    zero_point = torch.zeros_like(q.scale, dtype=torch.int32) if q.zero_point is None else q.zero_point
    return moved, zero_point - 128


@overload
def _column(values: Tensor, q: QTensor, start: int) -> Tensor: ...
@overload
def _column(values: None, q: QTensor, start: int) -> None: ...
def _column(values: Tensor | None, q: QTensor, start: int) -> Tensor | None:
    """The scales (or zero points) that hold from column ``start`` on, [rows, 1] or [1, 1]."""
    if values is None:
        return None
    index = start // q.block[1] if values.shape[1] > 1 else 0
    column = values[:, index : index + 1]
    return expand_blocks(column, (q.shape[0], 1), (q.block[0], 1)) if column.shape[0] > 1 else column


def _batches(q: QTensor, batch: torch.Size) -> list[QTensor]:
    """The matrices of a batched QTensor, broadcast to ``batch``."""
    rows = q.block[-2:]
    lead = tuple(q.shape[:-2])
    codes = q.codes.expand(*batch, *q.shape[-2:]).reshape(-1, *q.shape[-2:])

    def spread(t: Tensor) -> Tensor:
        t = expand_blocks(t, (*lead, *t.shape[-2:]), (*q.block[:-2], 1, 1))
        return t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:])

    zeros = [None] * len(codes) if q.zero_point is None else spread(q.zero_point)
    return [QTensor(c, s, z, q.format, rows, q.dtype) for c, s, z in zip(codes, spread(q.scale), zeros, strict=True)]
