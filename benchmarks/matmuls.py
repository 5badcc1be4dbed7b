"""The FP8 matmul: exact products, FP32 sums, at BF16's speed. Target: 4 times ``torch._scaled_mm`` at M = 512.

"Equal" means: our FP32 result, rounded to BF16, is within one BF16 rounding of what ``torch._scaled_mm`` gives in BF16.
The time is that of the product of codes; INT8 and mixed products stand beside it.
"""

from typing import Any

import torch

import octavo as ov
from benchmarks.measure import markdown, timed
from octavo.core.matmul import multiply

TARGET = 4.0
PAIRS = [
    ("E4M3FN", "E4M3FN"),
    ("E5M2", "E4M3FN"),
    ("E3M4", "E3M4"),
    ("E2M5", "E2M5"),
    ("E3M4", "INT8"),
    ("INT8", "INT8"),
]


def run(rows: int = 512, inner: int = 2048, columns: int = 2048) -> dict[str, Any]:
    """Measure, print and return the ratios."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    one = torch.ones(())
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    a16, b16 = a8.bfloat16(), b8.bfloat16()
    ways = {
        "torch._scaled_mm, E4M3FN": lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16),
        "torch FP32": lambda: a @ b.T,
        "torch BF16": lambda: a16 @ b16.T,
        "octavo float_mm of decoded numbers": lambda: ov.ops.float_mm(a16, b16),
    }
    for left, right in PAIRS:
        x = ov.quantize(a, ov.Cast(ov.formats.get(left), ov.PerToken()))
        w = ov.quantize(b, ov.Cast(ov.formats.get(right), ov.PerChannel(0)))
        ways[f"octavo {left} × {right}, codes in, scaled out"] = lambda x=x, w=w: multiply(x, w)
    i8 = ov.quantize(a, ov.Cast("INT8", ov.PerToken())).codes, ov.quantize(b, ov.Cast("INT8", ov.PerToken())).codes
    ways["torch._int_mm, codes in, sums out"] = lambda: torch._int_mm(i8[0], i8[1].T)
    times = timed(ways, repeats=11)
    seconds = {name: t.median for name, t in times.items()}
    base = seconds["torch._scaled_mm, E4M3FN"]
    gops = {name: 2e-9 * rows * inner * columns / s for name, s in seconds.items()}
    table = [[name, f"{gops[name]:.0f}", times[name].spread, f"{base / s:.1f} ×"] for name, s in seconds.items()]
    print(
        markdown(
            [f"[{rows}, {inner}] × [{inner}, {columns}]", "GFLOP/s", "spread", f"against _scaled_mm (≥ {TARGET:g})"],
            table,
        )
    )

    exact = a8.double() @ b8.double().T
    ours = ov.ops.float_mm(a16, b16)
    theirs = torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16)
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)
    apart = ((ours.double() - theirs.double()).abs() / spacing).max().item()
    error = ((ours.double() - exact).abs() / (a8.double().abs() @ b8.double().abs().T)).max().item()
    ratio = base / seconds["octavo E4M3FN × E4M3FN, codes in, scaled out"]
    print(f"\nours − _scaled_mm: at most {apart:.3f} BF16 spacings (its rounding is ½)")
    print(f"ours − exact: at most {error:.1e} of Σ|a||b|")
    return {
        "gflops": gops,
        "ratio_to_scaled_mm": ratio,
        "bf16_spacings_apart": apart,
        "relative_error": error,
        "passed": ratio >= TARGET and apart <= 0.51,
    }
