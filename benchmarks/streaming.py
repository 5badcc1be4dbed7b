"""``octavo quantize --stream`` on a sharded checkpoint of 6 GB: peak memory, and speed against a copy of its files.

The checkpoint is a Llama with random bfloat16 weights. Every run is a process of its own and ends with everything on
the disk, the copy too (``fsync`` of every file); the copy reads and writes as ``cp`` does. Copy and streams take turns.

    python -m benchmarks.streaming [--folder DIR] [--gigabytes 6] [--repeats 3]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import markdown

SCHEMES = ("int8-dynamic", "fp8-dynamic", "int8-weight-only")
MOST_MEMORY, LEAST_SPEED = 1.5e9, 0.6
SHARD = 2_000_000_000


def run(folder: str | None = None, gigabytes: float = 6, repeats: int = 3) -> dict[str, Any]:
    """Measure, print and return seconds, bytes and ratios; whatever was written is removed again."""
    with tempfile.TemporaryDirectory(prefix="octavo-streaming-", dir=folder) as place:
        needed, free = 3 * gigabytes * 1e9, shutil.disk_usage(place).free
        if free < needed:
            raise SystemExit(f"{place} has {free / 1e9:.1f} GB free and {needed / 1e9:.0f} GB are needed: --folder DIR")
        source = Path(place, "source")
        size = make(source, gigabytes)
        seconds: dict[str, list[float]] = {name: [] for name in ("copy", *SCHEMES)}
        memory = dict.fromkeys(SCHEMES, 0)
        for _ in range(repeats):
            for name in seconds:
                out = Path(place, "out")
                if name == "copy":
                    seconds[name].append(copy(source, out))
                else:
                    told = stream(source, out, name)
                    seconds[name].append(told["seconds"]["stream"])
                    memory[name] = max(memory[name], told["peak_memory_bytes"])
                shutil.rmtree(out)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    results: dict[str, Any] = {
        "bytes": size,
        "seconds": seconds,
        "copy_megabytes_per_second": size / 1e6 / median["copy"],
    }
    rows = [["copy", f"{size / 1e6 / median['copy']:.0f} MB/s", _spread(seconds["copy"]), "", ""]]
    for name in SCHEMES:
        ratio = median["copy"] / median[name]
        results[name] = {
            "megabytes_per_second": size / 1e6 / median[name],
            "ratio_to_copy": ratio,
            "peak_memory_bytes": memory[name],
            "passed": ratio >= LEAST_SPEED and memory[name] < MOST_MEMORY,
        }
        speed = f"{size / 1e6 / median[name]:.0f} MB/s"
        rows.append([name, speed, _spread(seconds[name]), f"{ratio:.2f} ×", f"{memory[name] / 1e6:.0f} MB"])
    header = [f"{size / 1e9:.2f} GB of bfloat16", "read at", "seconds", f"against copy (≥ {LEAST_SPEED})"]
    print(markdown([*header, f"peak memory (< {MOST_MEMORY / 1e6:.0f} MB)"], rows))
    return results


def make(folder: Path, gigabytes: float) -> int:
    """A Llama of about that size, without ever holding it; returns its bytes."""
    import transformers

    from octavo.io import shards

    width = 4096
    layer = width * width * 5 // 2 + 3 * width * 11008 + 2 * width
    layers = round((gigabytes * 1e9 / 2 - 2 * 32000 * width) / layer)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    units = [{name: (torch.bfloat16, tuple(tensor.shape))} for name, tensor in state.items()]
    arranged = shards.arrange(units, "model.safetensors", SHARD)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 22, generator=generator).mul_(0.02).bfloat16()
    with shards.writing(folder, arranged, {}) as writer:
        for name, tensor in state.items():
            for begin in range(0, tensor.numel(), len(block)):
                writer.append(name, block.roll(begin % 8191)[: tensor.numel() - begin])
            writer.finish_unit()
    return arranged.nbytes


def copy(source: Path, out: Path) -> float:
    """Seconds to copy the folder's files and have them on the disk."""
    started = time.perf_counter()
    out.mkdir()
    for file in sorted(source.iterdir()):
        subprocess.run(["cp", "--reflink=never", file, out], check=True)
        descriptor = os.open(out / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def stream(source: Path, out: Path, scheme: str) -> dict[str, Any]:
    """What the command says of itself."""
    words = ["quantize", str(source), "--stream", "--scheme", scheme, "--out", str(out), "--json"]
    said = subprocess.run([sys.executable, "-m", "octavo", *words], check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(said.stdout)
    return told


def _spread(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} ({min(times):.1f} … {max(times):.1f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where there is room for three times as much (default: the temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.folder, arguments.gigabytes, arguments.repeats), indent=1))
