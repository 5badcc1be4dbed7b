"""The roofline (Williams, Waterman and Patterson, 2009): what this machine could do at best, measured.

A kernel does F operations and must move B bytes. It cannot end before the arithmetic unit has done F operations, nor
before memory has moved B bytes; the larger of the two times is its roof. Peaks are those of the best matmul that
torch or we have here, memory's rate that of the best way we have to read a tensor much larger than the caches.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.analysis import machine
from octavo.analysis.bench.race import Timing

READ = 1 << 28  # bytes: many times any cache
SIZES = (1024, 2048)
#: The arithmetic unit, and the products of ``machine.measure`` that show what it can do.
PEAKS = {
    "FP32": ("FP32",),
    "BF16": ("BF16", "FP8 → FP32, ours"),
    "INT8": ("INT8 → INT32",),
}
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
LIKELY_CACHE = 32 << 20  # bytes, where the machine does not say


@dataclass(frozen=True)
class Roofline:
    """Bytes a second that can be read, operations a second by arithmetic unit."""

    bandwidth: float
    peaks: dict[str, float]

    def seconds(self, unit: str, flops: float | None, nbytes: float | None) -> float | None:
        """The least time for so many operations and bytes; None where neither is known."""
        times = []
        if flops is not None and unit in self.peaks:
            times.append(flops / self.peaks[unit])
        if nbytes is not None:
            times.append(nbytes / self.bandwidth)
        return max(times, default=None)

    def share(self, timing: Timing) -> float | None:
        """How near a timing is to its roof: 1 is as fast as can be; None where its work is not known."""
        least = self.seconds(timing.unit, timing.flops, timing.nbytes)
        return None if least is None or timing.median is None else least / timing.median

    def raised(self, timings: Iterable[Timing]) -> "Roofline":
        """The same, but never lower than what was reached: a peak may be measured while the machine was busier."""
        peaks, bandwidth = dict(self.peaks), self.bandwidth
        for timing in timings:
            if timing.median and timing.flops is not None and timing.unit in peaks:
                peaks[timing.unit] = max(peaks[timing.unit], timing.flops / timing.median)
            if timing.median and timing.nbytes is not None:
                bandwidth = max(bandwidth, timing.nbytes / timing.median)
        return Roofline(bandwidth, peaks)

    def __str__(self) -> str:
        peaks = ", ".join(f"{unit} {rate / 1e9:,.0f}" for unit, rate in self.peaks.items())
        return f"memory {self.bandwidth / 1e9:.1f} GB/s; {peaks} GFLOP/s"

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def measure(repeats: int = 5, device: str = "cpu", nbytes: int = READ, sizes: tuple[int, ...] = SIZES) -> Roofline:
    """Measure: some seconds."""
    wanted = tuple(name for names in PEAKS.values() for name in names)
    rates = [r for size in sizes for r in machine.measure(512, size, repeats, device, wanted)]
    best = {unit: max((r.gops for r in rates if r.what in names), default=0.0) for unit, names in PEAKS.items()}
    return Roofline(read_rate(nbytes, repeats, device), {unit: 1e9 * gops for unit, gops in best.items() if gops})


def read_rate(nbytes: int = READ, repeats: int = 5, device: str = "cpu") -> float:
    """Bytes a second that a large tensor can be read at, by the fastest of several ways: the median of repeats."""
    words = torch.zeros(nbytes // 4, device=device)
    matrix, vector = words.view(torch.bfloat16).view(-1, 4096), torch.zeros(4096, dtype=torch.bfloat16, device=device)
    copy = torch.empty(nbytes // 8, device=device)
    half = words[: nbytes // 8]
    ways: list[Callable[[], object]] = [
        lambda: words.sum(),
        lambda: words.view(torch.int32).amax(),
        lambda: matrix @ vector,
        lambda: copy.copy_(half),  # reads one half of the bytes and writes as many
    ]
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(-1, repeats):
        for times, way in zip(seconds, ways, strict=True):
            started = time.perf_counter()
            way()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn >= 0:
                times.append(time.perf_counter() - started)
    return nbytes / min(statistics.median(times) for times in seconds)


def cache_size() -> int:
    """Bytes of the last cache before memory."""
    sizes = []
    for file in CACHE.glob("index*/size"):
        text = file.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        sizes += [int(digits) * factor] if digits.isdecimal() else []
    return max(sizes, default=LIKELY_CACHE)
