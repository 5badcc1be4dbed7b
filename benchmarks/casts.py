"""Casts of 16 M float32: against ml_dtypes, and every 8-bit format, in place and not, against ``copy_``.

Targets: ``ov.cast`` at least 5 times ml_dtypes (formats that it lacks, E2M5, are compared with its E4M3); in place at
least 40 % of the speed of ``copy_``, for a cast and for ``fake_quantize_`` with scales per tensor, token and group.

    python -m benchmarks.casts
"""

from collections.abc import Callable
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
TARGET, IN_PLACE = 5.0, 0.4
GRANULARITIES = {"per tensor": ov.PerTensor(), "per token": ov.PerToken(), "groups of 64": ov.PerGroup(64)}


def run() -> dict[str, Any]:
    """Measure, print and return the rates in elements a second."""
    found = against_ml_dtypes()
    print()
    return found | {"against copy_": against_copy()}


def against_copy(repeats: int = 9) -> dict[str, Any]:
    """Every 8-bit format, 4096 rows of 4096 float32: the speed of each verb as a share of ``copy_``'s."""
    x = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    y, out = x.clone(), torch.empty_like(x)
    rows, results = [], {}
    for fmt in ov.formats.eight_bit():
        ways: dict[str, Callable[[], object]] = {
            "copy_": lambda: out.copy_(x),
            "cast_": lambda fmt=fmt: ov.cast_(y, fmt),
            "cast": lambda fmt=fmt: ov.cast(x, fmt),
        }
        for name, granularity in GRANULARITIES.items():
            how = ov.Cast(fmt, granularity)
            ways[f"fake_quantize_ {name}"] = lambda how=how: ov.fake_quantize_(y, how)
        token = ov.Cast(fmt, ov.PerToken())
        ways["fake_quantize per token"] = lambda how=token: ov.fake_quantize(x, how)
        times = timed(ways, repeats, warm=2)
        copied = times.pop("copy_").median
        shares = {name: copied / t.median for name, t in times.items()}
        in_place = [share for name, share in shares.items() if name.split()[0].endswith("_")]
        results[fmt.name] = {"share_of_copy": shares, "passed": min(in_place) >= IN_PLACE}
        speed = f"{x.numel() / copied / 1e9:.2f} G/s"
        rows.append([fmt.name, speed, *(f"{share:.0%} ({times[name].spread})" for name, share in shares.items())])
    print(markdown(["16 M float32", "copy_", *shares], rows))
    return results


def against_ml_dtypes() -> dict[str, Any]:
    """A few formats, out of place."""
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


if __name__ == "__main__":
    run()
