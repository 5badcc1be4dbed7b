"""Static scales on the demo model: what calibration costs, what each observer makes of it, and which layers resist.

``python -m benchmarks.calibration`` writes docs/calibration.md and .json. Text is Python's own documentation: one half
calibrates, the other judges. The observers that work on a histogram share one calibration pass.
"""

import copy
import json
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


class Demo:
    """The demo model, text to calibrate and to judge on, and what has been measured so far."""

    def __init__(self, windows: int) -> None:
        source = open_model("demo")
        self.model: nn.Module = source.model
        halves = text.split(text.read_text(None))
        self.judge = text.windows(source.tokenizer, halves[1], 512, windows)
        rows = text.windows(source.tokenizer, halves[0], 512, 8)
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


def main(windows: int = 8) -> None:
    """Measure, print, and write docs/."""
    here = machine.examine(rows=(), repeats=0)
    torch.manual_seed(0)
    demo = Demo(windows)
    pages = [
        "# Calibration",
        "Made by `python -m benchmarks.calibration`. SmolLM2-135M-Instruct in FP32; calibrated on "
        f"{len(demo.batches) * 2} windows of 512 tokens of one half of Python's documentation, judged on {windows} of "
        f"the other; {here.processor}; torch {here.torch}. Ratios of one run; losses are the perplexity's rise over "
        f"{demo.base:.3f} in percent.\n",
    ]
    results: dict[str, Any] = {"float": demo.base}

    def show(title: str, words: str, header: list[str], rows: list[list[str]]) -> None:
        page = f"## {title}\n\n{words}\n\n{markdown(header, rows)}\n"
        print(page)
        pages.append(page)

    shares = results["throughput"] = throughput(demo)
    rows = [[name, f"{100 * share:.0f} %"] for name, share in shares.items()]
    show("What it costs", "Speed of calibration as a share of plain inference.", ["observer", "share"], rows)

    dynamic = {name: demo.loss(f"{stem}-dynamic") for name, stem in FORMATS.items() if "affine" not in name}
    results["dynamic"] = dynamic
    down = ov.Rule("int8-dynamic", "*down_proj")
    rows = [["dynamic", *(f"{dynamic[n]:+.2f}" if n in dynamic else "" for n in FORMATS), ""]]
    results["static"] = {}
    for name, calibration in demo.watched():
        losses = {fmt: demo.loss(f"{stem}-static", calibration) for fmt, stem in FORMATS.items()}
        losses["mixed"] = demo.loss([down, ov.Rule("int8-static")], calibration)
        results["static"][name] = losses
        rows.append([name, *(f"{loss:+.2f}" for loss in losses.values())])
        print(rows[-1], flush=True)
        if name == "percentile 99.9":
            results["outliers"] = outliers(calibration)
    show(
        "What each observer costs in accuracy",
        "Inputs with one static scale a layer (weights: a scale a channel). The last column leaves `down_proj`, whose "
        "inputs hold the outliers, with dynamic INT8 scales.",
        ["observer", *FORMATS, "INT8, down_proj dynamic"],
        rows,
    )
    ordered = list(results["outliers"].items())[:12]
    show(
        "Which layers resist, and why",
        "A few tokens (the first of a text above all) make single numbers in the inputs of some `down_proj` thousands "
        "of times larger than the rest: massive activations (Sun et al., 2402.17762). One scale cannot hold both: with "
        "all of the range in 256 steps the ordinary numbers become 0, and with a clipped range the few that steer "
        "attention are lost, which costs more. A scale a token, or the wide range of E4M3 and E5M2, holds both.",
        ["layer's input", "largest", "99.9th percentile", "ratio"],
        [[f"`{n}`", f"{x['amax']:.4g}", f"{x['p99.9']:.3g}", f"{x['ratio']:.0f} ×"] for n, x in ordered],
    )
    (DOCS / "calibration.json").write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "calibration.md").write_text("\n".join(pages).rstrip() + "\n")


if __name__ == "__main__":
    main()
