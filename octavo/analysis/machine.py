"""What this machine does with small numbers: its units, and measured rates of the matmuls that matter.

Rates are medians of interleaved repeats in one run. Machines are noisy; compare the ratios, not the numbers.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo import ops
from octavo.ops import build, native

# /proc/cpuinfo's flag, what it is, what it is good for
CPU_UNITS = (
    ("avx512_vnni", "AVX512-VNNI", "INT8 dot products"),
    ("avx_vnni", "AVX-VNNI", "INT8 dot products"),
    ("avx512_bf16", "AVX512-BF16", "BF16 dot products: exact FP8 matmuls"),
    ("amx_int8", "AMX-INT8", "INT8 matrix tiles"),
    ("amx_bf16", "AMX-BF16", "BF16 matrix tiles"),
    ("amx_fp16", "AMX-FP16", "FP16 matrix tiles"),
    ("avx512fp16", "AVX512-FP16", "FP16 arithmetic"),
    ("asimddp", "Arm dot product", "INT8 dot products"),
    ("i8mm", "Arm I8MM", "INT8 matrix products"),
    ("bf16", "Arm BF16", "BF16 matrix products"),
)
ARM = ("asimddp", "i8mm", "bf16")

#: The products that ``examine`` measures.
COMMON = ("FP32", "BF16", "INT8 → INT32", "FP8 → FP32, ours", "FP8, torch._scaled_mm")


@dataclass(frozen=True)
class Unit:
    """One hardware unit: its name, what it serves, whether it is here."""

    name: str
    serves: str
    present: bool


@dataclass(frozen=True)
class Rate:
    """A measured matmul [rows, size] × [size, size]: billions of operations a second, and relative to FP32."""

    what: str
    rows: int
    size: int
    gops: float
    ratio: float


@dataclass(frozen=True)
class Machine:
    """What ``octavo doctor`` says."""

    processor: str
    threads: int
    torch: str
    device: str
    native: str
    units: list[Unit]
    rates: list[Rate]


def examine(rows: tuple[int, ...] = (1, 512), size: int = 1024, repeats: int = 7) -> Machine:
    """Look at this machine, and measure: a few seconds."""
    flags = cpu_flags()
    arm = "asimd" in flags
    units = [Unit(name, serves, flag in flags) for flag, name, serves in CPU_UNITS if (flag in ARM) == arm]
    device = "none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
        units.append(Unit("CUDA INT8 tensor cores", "INT8 matmuls", (major, minor) >= (7, 5)))
        units.append(Unit("CUDA FP8 tensor cores", "E4M3 and E5M2 matmuls", (major, minor) >= (8, 9)))
    measured = [rate for m in rows for rate in measure(m, size, repeats)]
    return Machine(_processor(), torch.get_num_threads(), torch.__version__, device, _kernels(), units, measured)


def measure(rows: int, size: int, repeats: int, device: str = "cpu", wanted: tuple[str, ...] = COMMON) -> list[Rate]:
    """Rates of the wanted products, less those that torch refuses on this device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size, generator=generator).to(device)
    w = torch.randn(size, size, generator=generator).to(device)
    x16, w16, xh, wh = x.bfloat16(), w.bfloat16(), x.half(), w.half()
    x8, w8 = (torch.randint(-127, 128, t.shape, dtype=torch.int8, generator=generator).to(device) for t in (x, w))
    one = torch.ones((), device=device)

    def scaled(left: torch.dtype, right: torch.dtype) -> Callable[[], object]:
        a, b = x.to(left), w.to(right)
        return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)

    fn, fnuz = torch.float8_e4m3fn, torch.float8_e4m3fnuz
    runs: dict[str, Callable[[], object]] = {
        "FP32": lambda: x @ w.T,
        "FP16": lambda: xh @ wh.T,
        "BF16": lambda: x16 @ w16.T,
        "INT8 → INT32": lambda: ops.int_mm(x8, w8),
        "FP8 → FP32, ours": lambda: ops.float_mm(x16, w16),
        "FP8, torch._scaled_mm": scaled(fn, fn),
        "E5M2, torch._scaled_mm": scaled(fn, torch.float8_e5m2),  # CUDA refuses two in E5M2
        "E4M3FNUZ, torch._scaled_mm": scaled(fnuz, fnuz),
    }
    runs = {name: run for name, run in runs.items() if name in {"FP32", *wanted} and _works(run)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    work = 2e-9 * rows * size * size
    rate = {name: work / statistics.median(times) for name, times in seconds.items()}
    return [Rate(name, rows, size, value, value / rate["FP32"]) for name, value in rate.items() if name in wanted]


def _works(run: Callable[[], object]) -> bool:
    """Warms up, and finds out."""
    try:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except (RuntimeError, ValueError):
        return False
    return True


def cpu_flags() -> set[str]:
    """What the first processor in /proc/cpuinfo can do; empty where there is no such file."""
    try:
        with open("/proc/cpuinfo", encoding="utf8") as file:
            lines = [line for line in file if line.lower().startswith(("flags", "features"))]
    except OSError:
        return set()
    return set(lines[0].partition(":")[2].split()) if lines else set()


def _kernels() -> str:
    return f"{build.status()}; {native.bind()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf8") as file:
            for line in file:
                if line.startswith("model name"):
                    return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
