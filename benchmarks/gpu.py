"""A layer in 8 bits on a GPU against the same layer in BF16, quantization included; writes docs/gpu.md.

Target: FP8 row-wise and INT8, both dynamic, at least 1.4 times BF16 at 4096 × 4096 × 4096. Run it on a machine with a
GPU: ``python -m benchmarks.gpu``. Without one it says so and leaves the page as it is.

Ways are interleaved; times are medians between events on the GPU, each with other data in its cache than its own.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import octavo as ov
from benchmarks.measure import markdown

TARGET = 1.4
SCHEMES = ("fp8-dynamic", "int8-dynamic", "fp8-block", "fp8-weight-only", "int8-weight-only")
SIZES = ((4096, 4096, 4096), (512, 4096, 4096), (16, 4096, 4096))
PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"


def timed(ways: dict[str, Callable[[], object]], repeats: int = 50, warm: int = 10) -> dict[str, float]:
    """Median milliseconds of each way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    cache = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # more than any GPU's cache
    for turn in range(-warm, repeats):
        for name, way in ways.items():
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            end.record()
            end.synchronize()
            if turn >= 0:
                found[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in found.items()}


def graph_of(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The layer as a CUDA graph, so that Python takes no part in what is measured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    return graph.replay


@torch.no_grad()
def run() -> dict[str, Any] | None:
    """Measure, print, write the page and return the ratios to BF16; None without a GPU."""
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here; this measures a GPU, run it on a machine that has one")
        return None
    ratios: dict[str, dict[str, float]] = {}
    rows = []
    for m, k, n in SIZES:
        torch.manual_seed(0)
        plain = torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        layers = {"bf16": plain}
        for scheme in SCHEMES:
            model = torch.nn.Sequential(torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16))
            model[0].load_state_dict(plain.state_dict())
            ov.quantize_(model, scheme)
            layers[scheme] = model
        times = timed({name: graph_of(layer, x) for name, layer in layers.items()})
        exact = plain(x).float()
        size = f"{m} × {k} × {n}"
        ratios[size] = {name: times["bf16"] / times[name] for name in SCHEMES}
        for name, layer in layers.items():
            tops = 2e-9 * m * k * n / times[name]
            error = "" if name == "bf16" else f"{ov.sqnr(exact, layer(x).float()):.1f}"
            rows.append(
                [size, name, f"{times[name]:.4f}", f"{tops:.0f}", f"{times['bf16'] / times[name]:.2f} ×", error]
            )
    table = markdown(["M × K × N", "layer", "ms", "TFLOP/s", f"against BF16 (≥ {TARGET:g})", "dB to BF16"], rows)
    versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(table)
    PAGE.write_text(
        f"# On a GPU\n\nWhole layers, quantization of the input included, by `python -m benchmarks.gpu` on {versions}. "
        f"Medians of interleaved runs of CUDA graphs, caches cleared in between.\n\n{table}\n"
    )
    largest = ratios[" × ".join(map(str, SIZES[0]))]
    return {"ratios": ratios, "passed": min(largest["fp8-dynamic"], largest["int8-dynamic"]) >= TARGET}


if __name__ == "__main__":
    result = run()
    sys.exit(0 if result is None or result["passed"] else 1)
