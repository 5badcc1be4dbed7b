"""``ov.cast`` against ml_dtypes on 16 M float32. Target: at least 5 times ml_dtypes, for any 8-bit float format.

Formats that ml_dtypes lacks (E2M5) are compared with its E4M3.
"""

from typing import Any

import ml_dtypes
import numpy as np
import torch

import octavo as ov
from benchmarks.measure import markdown, timed

PEERS = {
    "E4M3FN": ml_dtypes.float8_e4m3fn,
    "E4M3": ml_dtypes.float8_e4m3,
    "E5M2": ml_dtypes.float8_e5m2,
    "E3M4": ml_dtypes.float8_e3m4,
    "E2M5": ml_dtypes.float8_e4m3,
}
TARGET = 5.0


def run() -> dict[str, Any]:
    """Measure, print and return the rates in elements a second."""
    x = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    numbers, out = x.numpy(), torch.empty_like(x)
    rows, results = [], {}
    for name, peer in PEERS.items():
        fmt = ov.formats.get(name)
        times = timed(
            {
                "octavo": lambda fmt=fmt: ov.cast(x, fmt),
                "ml_dtypes": lambda peer=peer: numbers.astype(peer).astype(np.float32),
                "copy_": lambda: out.copy_(x),
            },
            repeats=7,
        )
        seconds = {way: t.median for way, t in times.items()}
        ratio = seconds["ml_dtypes"] / seconds["octavo"]
        results[name] = {
            "ratio_to_ml_dtypes": ratio,
            "ratio_to_copy": seconds["copy_"] / seconds["octavo"],
            "elements_per_second": len(x) / seconds["octavo"],
            "passed": ratio >= TARGET,
        }
        speed = f"{len(x) / seconds['octavo'] / 1e9:.2f} G/s"
        rows.append([name, speed, times["octavo"].spread, f"{ratio:.1f} ×", f"{results[name]['ratio_to_copy']:.2f} ×"])
    print(
        markdown(
            ["cast of 16 M float32", "octavo", "spread", f"against ml_dtypes (≥ {TARGET:g})", "against copy_"], rows
        )
    )
    return results
