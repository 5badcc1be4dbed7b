"""Static scales on the demo model: what calibration costs, what each observer makes of it, and which layers resist.

``python -m benchmarks.calibration [throughput] [accuracy]`` writes docs/calibration.md and .json. Text is Python's own
documentation: one half calibrates, the other judges. Observers that watch a histogram share one pass.
"""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo as ov
from benchmarks.measure import interleaved, markdown
from octavo.analysis import machine
from octavo.calibration import MSE, Entropy, LineSearch, MinMax, MovingAverage, Observer, Percentile
from octavo.io import text
from octavo.io.huggingface import open_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
OBSERVERS: dict[str, Observer] = {
    "min/max": MinMax(),
    "moving average 0.9": MovingAverage(0.9),
    "percentile 99.9": Percentile(99.9),
    "percentile 99.99": Percentile(99.99),
    "percentile 99.999": Percentile(99.999),
    "entropy": Entropy(),
    "MSE": MSE(),
    "line search": LineSearch("flexible-bias"),
}
FORMATS = {"INT8": "int8", "INT8 affine": "int8-affine", "E4M3FN": "fp8", "E3M4": "e3m4", "E5M2": "e5m2"}
MIXED = "INT8, down_proj dynamic"
CALIBRATION = 8  # windows


class Demo:
    """The demo model, text to calibrate and to judge on, and what has been measured so far."""

    def __init__(self, windows: int = 8) -> None:
        source = open_model("demo")
        self.model: nn.Module = source.model
        halves = text.split(text.read_text(None))
        self.judge = text.windows(source.tokenizer, halves[1], 512, windows)
        rows = text.windows(source.tokenizer, halves[0], 512, CALIBRATION)
        self.batches = [{"input_ids": part} for part in rows.split(2)]
        self.base = ov.perplexity(self.model, self.judge).value

    def loss(self, rules: Any, data: Any = None) -> float:
        """The perplexity's rise in percent."""
        twin = copy.deepcopy(self.model)
        ov.quantize_(twin, rules, data)
        return 100 * (ov.perplexity(twin, self.judge).value / self.base - 1)

    def watched(self) -> Iterator[tuple[str, ov.Calibration]]:
        """Every observer's calibration of all layers, from three passes over the data."""
        gathered = ov.calibrate(self.model, "int8-static", self.batches, Percentile())
        for name, observer in OBSERVERS.items():
            if isinstance(observer, MovingAverage):
                yield name, ov.calibrate(self.model, "int8-static", self.batches, observer)
                continue
            yield name, ov.Calibration({n: observer.fresh().adopt(o) for n, o in gathered.observers.items()})


def throughput(demo: Demo) -> dict[str, float]:
    """How much of plain inference's speed is left while observers watch."""
    batch = demo.batches[:1]

    def plain() -> None:
        with torch.no_grad():
            demo.model(**batch[0])

    watchers = {name: OBSERVERS[name] for name in ("min/max", "moving average 0.9", "percentile 99.99", "MSE")}
    ways = {name: lambda o=o: ov.calibrate(demo.model, "int8-static", batch, o) for name, o in watchers.items()}
    seconds = interleaved({"inference": plain, **ways}, repeats=5)
    shares = {name: seconds["inference"] / seconds[name] for name in watchers}
    return shares


def outliers(calibration: ov.Calibration) -> dict[str, Any]:
    """The layers whose largest input is farthest above their 99.9th percentile."""
    how = ov.Cast("INT8", scale=ov.Static())
    found = {}
    for name, observer in calibration.observers.items():
        most, usual = (float(o.fresh().adopt(observer).range(how)[1]) for o in (MinMax(), Percentile(99.9)))
        low = -float(MinMax().adopt(observer).range(how)[0])
        found[name] = {"amax": max(most, low), "p99.9": usual, "ratio": max(most, low) / usual}
    return dict(sorted(found.items(), key=lambda row: -row[1]["ratio"]))


def accuracy(demo: Demo) -> dict[str, Any]:
    """The loss of every observer in every format, static, beside dynamic scales; and which layers' inputs resist."""
    found: dict[str, Any] = {"float": demo.base, "windows": len(demo.judge)}
    found["dynamic"] = {name: demo.loss(f"{stem}-dynamic") for name, stem in FORMATS.items() if "affine" not in name}
    found["static"] = {}
    down = ov.Rule("int8-dynamic", "*down_proj")
    for name, calibration in demo.watched():
        losses = {fmt: demo.loss(f"{stem}-static", calibration) for fmt, stem in FORMATS.items()}
        losses[MIXED] = demo.loss([down, ov.Rule("int8-static")], calibration)
        found["static"][name] = losses
        print(name, losses, flush=True)
        if name == "percentile 99.9":
            found["outliers"] = outliers(calibration)
    return found


def page(results: dict[str, Any]) -> str:
    """docs/calibration.md."""
    dynamic, static = results["dynamic"], results["static"]
    best = min(static, key=lambda name: static[name][MIXED])
    behind = static[best][MIXED] - dynamic["INT8"]
    rows = [["dynamic", *(f"{dynamic[n]:+.2f}" if n in dynamic else "" for n in FORMATS), ""]]
    rows += [[name, *(f"{loss:+.2f}" for loss in losses.values())] for name, losses in static.items()]
    top = list(results["outliers"].items())[:12]
    return f"""# Calibration

Made by `python -m benchmarks.calibration`. SmolLM2-135M-Instruct in FP32, calibrated on {CALIBRATION} windows of 512
tokens of one half of Python's documentation, judged on {results["windows"]} of the other. {results["machine"]}. Losses
are the rise of the perplexity over {results["float"]:.3f}, in percent.

## What it costs

Speed of calibration as a share of plain inference, interleaved in one run.

{markdown(["observer", "share"], [[name, f"{100 * share:.0f} %"] for name, share in results["throughput"].items()])}

## What each observer costs in accuracy

Inputs with one static scale a layer, weights with a scale a channel. The last column leaves `down_proj`, whose inputs
hold the outliers, with dynamic INT8 scales: there {best} is {behind:+.2f} points behind INT8 that is dynamic
everywhere.

{markdown(["observer", *FORMATS, MIXED], rows)}

## Which layers resist, and why

A few tokens (the first of a text above all) make single numbers in the inputs of some `down_proj` thousands of times
larger than the rest: massive activations (Sun et al., 2402.17762). One INT8 scale cannot hold both: over the whole
range the ordinary numbers become 0, and with a clipped range the few that steer attention are lost, which costs more.
A scale a token holds both, and so does the wide range of E4M3 or E5M2 if nothing is clipped (min/max, MSE, entropy).

{
        markdown(
            ["layer's input", "largest", "99.9th percentile", "ratio"],
            [[f"`{n}`", f"{x['amax']:.4g}", f"{x['p99.9']:.3g}", f"{x['ratio']:.0f} ×"] for n, x in top],
        )
    }
"""


def main(parts: list[str]) -> None:
    """Measure "throughput", "accuracy", or both, and write docs/; what is not measured stays as it was."""
    here = machine.examine(rows=(), repeats=0)
    torch.manual_seed(0)
    demo = Demo()
    file = DOCS / "calibration.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not parts or "throughput" in parts:
        results["machine"] = f"{here.processor}; {here.threads} threads; torch {here.torch}"
        results["throughput"] = throughput(demo)
    if not parts or "accuracy" in parts:
        results |= accuracy(demo)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "calibration.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main(sys.argv[1:])
