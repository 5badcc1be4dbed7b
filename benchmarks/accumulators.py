"""Emulated accumulators on [512, 512] × [512, 512], in multiply-accumulates a second.

Targets: IBM's 1-6-9 in chunks of 64, rounded to nearest-even after every addition, at 0.5 G a second and 20 times a
torch loop over K; and the FP8 product with FP32 sums, codes in, at 88 % of torch's BF16 matmul on 1024³. Two loops
stand beside ours: the law in ``ops/reference.py``, right for all operands, and one written for speed, in place in
float32, which is right for 8-bit operands only. Results are compared bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

import octavo as ov
from benchmarks.measure import interleaved, markdown, timed
from octavo.core.accumulate import Chunked, Integer, Sequential, TensorCore, sum_products
from octavo.core.matmul import multiply
from octavo.ops import reference

TARGET_RATE, TARGET_RATIO, TARGET_OF_BF16 = 0.5e9, 20.0, 0.88
IBM = Chunked("FP16_169", 64)


def quick_loop(a: Tensor, b: Tensor, chunk: int = 64) -> Tensor:
    """1-6-9 in chunks by a torch loop over K, in place in float32, for operands whose products have 10 bits."""
    least, lowest = 2.0**-30, 1.5 * 2.0 ** (-30 + 23)
    high = ov.formats.FP16_169.max
    left, right = a.T.contiguous(), b.T.contiguous()
    total, part = torch.zeros(len(a), len(b)), torch.zeros(len(a), len(b))
    field = torch.empty(part.shape, dtype=torch.int32)
    magic = field.view(torch.float32)

    def round_(x: Tensor) -> None:
        torch.bitwise_and(x.view(torch.int32), 0x7F800000, out=field)
        flushed = magic < least
        field.add_(14 << 23 | 1 << 22)
        magic.masked_fill_(flushed, lowest)
        x.add_(magic).sub_(magic).clamp_(-high, high)

    for k in range(a.shape[1]):
        part.addr_(left[k], right[k])
        round_(part)
        if (k + 1) % chunk == 0 or k + 1 == a.shape[1]:
            total.add_(part)
            round_(total)
            part.zero_()
    return total


def run(size: int = 512) -> dict[str, Any]:
    """Measure, print and return the rates and ratios."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, size, generator=generator) for _ in range(2))
    a, b = (ov.quantize(t, ov.Cast("E5M2")).numbers() for t in (x, w))
    small = (4 * a / a.abs().max()).to(torch.float8_e5m2).float()
    c, d = (ov.quantize(t, ov.Cast("INT8")).numbers() for t in (x, w))
    grid = (9, -30, ov.formats.FP16_169.max, True, False)
    ways = {
        "1-6-9, chunks of 64, E5M2": lambda: sum_products(a, b, IBM),
        "the same, far from overflow": lambda: sum_products(small, b, IBM),
        "the same, INT8 operands": lambda: sum_products(c, d, IBM),
        "the same, stochastic": lambda: sum_products(a, b, Chunked("FP16_169", 64, "stochastic")),
        "FP16": lambda: sum_products(small, small, Sequential("FP16")),
        "BF16, toward zero": lambda: sum_products(a, b, Sequential("BF16", "toward-zero")),
        "tensor core, 14 bits": lambda: sum_products(a, b, TensorCore()),
        "INT16, saturating": lambda: sum_products(c, d, Integer(16, "saturate")),
        "INT32, wrapping": lambda: sum_products(c, d, Integer()),
        "torch loop, quick, E5M2": lambda: quick_loop(a, b),
    }
    seconds = interleaved(ways, repeats=5, warm=2)
    few = size // 8  # the law takes its time: an eighth of K
    law = {
        "torch loop, the law": lambda: reference.accumulate_mm(
            a[:, :few], b[:, :few], *grid, 64, *grid, "nearest-even", 0
        )
    }
    seconds |= {name: s * size / few for name, s in interleaved(law, repeats=1, warm=1).items()}
    rates = {name: size**3 / s for name, s in seconds.items()}
    ours = "1-6-9, chunks of 64, E5M2"
    table = [
        [name, f"{rate / 1e9:.3f}", f"{rate / rates['torch loop, quick, E5M2']:.1f} ×"] for name, rate in rates.items()
    ]
    print(markdown(["accumulator", "G multiply-accumulates a second", "against the quick loop"], table))
    to_law, to_loop = (rates[ours] / rates[f"torch loop, {name}"] for name in ("the law", "quick, E5M2"))
    same = torch.equal(sum_products(a, b, IBM), quick_loop(a, b))
    print(f"\n{ours}: {to_law:.0f} times the law's loop, {to_loop:.1f} times the quick one; same bits: {same}\n")

    x, w = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    p, q = (ov.quantize(t, ov.Cast("E4M3FN")) for t in (x, w))
    x16, w16 = p.numbers(torch.bfloat16), q.numbers(torch.bfloat16)
    exact = timed(
        {
            "torch BF16": lambda: x16 @ w16.T,
            "octavo E4M3FN, codes in, FP32 out": lambda: multiply(p, q),
            "octavo E4M3FN, codes in, BF16 out": lambda: multiply(p, q, dtype=torch.bfloat16),
            "octavo matmul of QTensors": lambda: ov.matmul(p, q.mT),
        },
        repeats=31,
    )
    base = exact["torch BF16"].median
    table = [
        [name, f"{2e-9 * 1024**3 / t.median:.0f}", t.spread, f"{100 * base / t.median:.0f} %"]
        for name, t in exact.items()
    ]
    target = f"of torch's BF16 (≥ {100 * TARGET_OF_BF16:.0f} %)"
    print(markdown(["1024³, FP32 sums", "GFLOP/s", "spread", target], table))
    of_bf16 = base / exact["octavo matmul of QTensors"].median
    return {
        "rates": rates,
        "ratio_to_the_law": to_law,
        "ratio_to_the_quick_loop": to_loop,
        "same_bits": same,
        "fp8_of_bf16": of_bf16,
        "passed": rates[ours] >= TARGET_RATE and min(to_law, to_loop) >= TARGET_RATIO and of_bf16 >= TARGET_OF_BF16,
    }
