"""What every 8-bit format costs two trained networks: ``python -m examples.fashion_mnist.quantize``.

Prints the tables and writes them to ``docs/vision.md`` and ``docs/vision.json``. The formats stand in the order of the
published table for convolutional networks (Kuzmin et al., 2303.17951 and 2208.09225).
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import octavo as ov
from examples.fashion_mnist import tasks
from examples.fashion_mnist.models import MODELS
from examples.fashion_mnist.train import scores

DOCS = Path(__file__).resolve().parents[2] / "docs"
FORMATS = ("INT8", "E2M5", "E3M4", "E4M3FN", "E5M2")
OBSERVERS: dict[str, ov.calibration.Observer] = {
    "minmax": ov.calibration.MinMax(),
    "moving-average=0.9": ov.calibration.MovingAverage(momentum=0.9),
    "percentile=99.99": ov.calibration.Percentile(percent=99.99),
    "percentile=99.9": ov.calibration.Percentile(percent=99.9),
    "entropy": ov.calibration.Entropy(),
    "mse": ov.calibration.MSE(),
    "line-search=flexible-bias": ov.calibration.LineSearch(mode="flexible-bias"),
}
BY_RANGE = "INT8 static, by range"
RANGE = "mse"  # of the weights, and of the inputs where scales are static


@dataclass(frozen=True)
class Cost:
    """What a scheme did to a network.

    ``accuracy``: percent of the test pictures. ``change``: points gained against FP32, with the standard error
    ``error``; ``step`` and ``step_error``: the same against the row before. ``sqnr``: of the scores, in dB.
    """

    scheme: str
    accuracy: float
    change: float
    error: float
    step: float
    step_error: float
    sqnr: float


def paired(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Points gained on the same pictures and their standard error (McNemar's), from which were right, bool [N]."""
    count = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    change = (gained - lost) / count
    return 100 * change, 100 * math.sqrt(((gained + lost) / count - change**2) / count)


class Bench:
    """A trained float network, its scores on the test pictures, and what calibration has seen of it."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, calibration: Sequence[Tensor]) -> None:
        self.model, self.images, self.labels, self.batches = model, images, labels, calibration
        self.scores = scores(model, images)
        self.right = self.scores.argmax(1) == labels
        self.accuracy = 100 * float(self.right.double().mean())
        self.seen: dict[str, ov.Calibration] = {}

    @property
    def error(self) -> float:
        """The standard error of an accuracy on so many pictures, in points."""
        share = self.accuracy / 100
        return 100 * math.sqrt(share * (1 - share) / len(self.labels))

    def scores_of(self, scheme: ov.Scheme, ranges: str) -> Tensor:
        """Quantize a copy of the network, and let it judge all test pictures."""
        model = copy.deepcopy(self.model)
        if scheme.static and ranges not in self.seen:
            self.seen[ranges] = ov.calibrate(model, ov.schemes.INT8_STATIC, self.batches, OBSERVERS[ranges])
        data = self.seen[ranges] if scheme.static else None
        ov.quantize_(model, scheme, data, weight_observer=OBSERVERS[RANGE])
        return scores(model, self.images)

    def table(self, title: str, schemes: dict[str, ov.Scheme]) -> list[Cost]:
        """A row a scheme; one that is called like an observer has its inputs' ranges from there."""
        rows: list[Cost] = []
        last = self.right
        for name, scheme in schemes.items():
            started = time.perf_counter()
            found = self.scores_of(scheme, name if name in OBSERVERS else RANGE)
            right = found.argmax(1) == self.labels
            accuracy, quality = 100 * float(right.double().mean()), ov.sqnr(self.scores, found)
            rows.append(Cost(name, accuracy, *paired(self.right, right), *paired(last, right), quality))
            last = right
            seconds = time.perf_counter() - started
            print(f"  {title}: {name} {accuracy:.2f} %, {quality:.1f} dB, {seconds:.0f} s", flush=True)
        return rows


def tables(bench: Bench) -> dict[str, list[Cost]]:
    """All that is measured of one network, by the title of the table."""
    fixed = {fmt: ov.schemes.static(fmt) for fmt in FORMATS}
    affine = {"INT8, inputs with a zero point": ov.schemes.INT8_AFFINE_STATIC}
    current = {fmt: ov.schemes.dynamic(fmt) for fmt in FORMATS}

    def whole(schemes: dict[str, ov.Scheme]) -> dict[str, ov.Scheme]:
        """The same with one scale for the whole weight."""
        return {name: replace(x, weight=replace(x.weight, granularity=ov.PerTensor())) for name, x in schemes.items()}

    wanted = {
        "static": fixed | affine,
        "dynamic": current,
        "static, one scale a weight": whole(fixed | affine),
        "dynamic, one scale a weight": whole(current),
        BY_RANGE: dict.fromkeys(OBSERVERS, ov.schemes.INT8_STATIC),
    }
    return {title: bench.table(title, schemes) for title, schemes in wanted.items()}


EXPLAINED = {
    "static": "One scale for each layer's input, a scale an output channel for its weight.",
    "dynamic": "A scale an image for each layer's input, made as it comes, a scale an output channel for its weight.",
    "static, one scale a weight": "One scale for each layer's input and one for its weight.",
    "dynamic, one scale a weight": "A scale an image for each layer's input, one for its weight.",
    BY_RANGE: "What `--calibrate` makes of the inputs seen; the ranges of the weights are the same.",
}


def page(pictures: str, benches: dict[str, Bench], found: dict[str, dict[str, list[Cost]]]) -> str:
    """The whole of docs/vision.md."""
    some = next(iter(benches.values()))
    parts = [
        "# Convolutional networks in 8 bits",
        "",
        "Written by `python -m examples.fashion_mnist.quantize` (`make vision`); do not edit. How it is done, and the",
        "two networks: [examples/fashion_mnist](../examples/fashion_mnist/README.md).",
        "",
        f"{pictures}, {len(some.labels):,} test pictures. Every layer is 8-bit, the first and the last too; BatchNorms",
        "are folded; nothing is retrained. Ranges are those of least squared error, of inputs found on",
        f"{sum(map(len, some.batches)):,} pictures kept apart from the training, where a table does not say otherwise.",
        "`points` is the change against FP32 on the same pictures, ± its standard error; `to the row above`",
        f"is the change against that row; `SQNR` compares the scores with those of FP32. torch {torch.__version__}.",
    ]
    for name, bench in benches.items():
        parts += ["", f"## {name}", "", f"FP32: {bench.accuracy:.2f} % ± {bench.error:.2f}. Points against it:", ""]
        parts += summary(found[name])
        for title, rows in found[name].items():
            parts += ["", f"### {name}: {title}", "", EXPLAINED[title], ""]
            parts += ["| | accuracy | points | to the row above | SQNR |", "| --- | ---: | ---: | ---: | ---: |"]
            parts += [
                f"| {x.scheme} | {x.accuracy:.2f} % | {x.change:+.2f} ± {x.error:.2f} "
                f"| {'' if row == 0 else f'{x.step:+.2f} ± {x.step_error:.2f}'} | {x.sqnr:.1f} dB |"
                for row, x in enumerate(rows)
            ]
    return "\n".join(parts) + "\n"


def summary(found: dict[str, list[Cost]]) -> list[str]:
    """What each format costs: a row a format, a column a table."""
    columns = {title: rows for title, rows in found.items() if title != BY_RANGE}
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for fmt in FORMATS:
        costs = [next(x for x in rows if x.scheme == fmt) for rows in columns.values()]
        lines.append(f"| {fmt} | {' | '.join(f'{x.change:+.2f} ± {x.error:.2f}' for x in costs)} |")
    return lines


def main() -> None:
    """Train what is not trained, measure everything, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder to write to (default: docs/, for Fashion-MNIST only)")
    arguments = parser.parse_args()
    pictures = tasks.pictures()
    benches = {}
    found = {}
    for name in MODELS:
        bench = benches[name] = Bench(tasks.folded(name), *pictures.test, tasks.calibration())
        print(f"{name}: FP32 {bench.accuracy:.2f} % ± {bench.error:.2f}", flush=True)
        found[name] = tables(bench)
    text = page(pictures.name, benches, found)
    print(text)
    out = arguments.out or (DOCS if pictures.name != "digits" else None)
    if out is None:
        print("These are the digits: docs/ stays as it is. `--out DIR` writes them elsewhere.")
        return
    document = {
        "pictures": pictures.name,
        "torch": torch.__version__,
        "octavo": ov.__version__,
        "networks": {
            name: {
                "fp32": bench.accuracy,
                "error": bench.error,
                **{k: [asdict(x) for x in v] for k, v in found[name].items()},
            }
            for name, bench in benches.items()
        },
    }
    (out / "vision.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "vision.md").write_text(text)


if __name__ == "__main__":
    main()
