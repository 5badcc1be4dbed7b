"""Smoothing on the demo model: what α does for norms and for ``up_proj → down_proj``, by scheme.

``python -m benchmarks.smoothing [scheme …]`` writes docs/smoothing.md and .json. Text is Python's own documentation:
one half calibrates, the other judges, by perplexity and by how far the predictions are from the float model's (KL),
which scatters less. Rows are kept as they come and not measured again: remove the .json first.
"""

import copy
import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import octavo as ov
from benchmarks.measure import markdown
from octavo.analysis import machine
from octavo.io import text
from octavo.io.huggingface import open_model

FILE = Path(__file__).resolve().parent.parent / "docs" / "smoothing.json"
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
Setting = tuple[float | str | None, float | str | None]  # α of norms, α of up_proj → down_proj
FEW: list[Setting] = [(None, None), (0.7, 0.5), (0.7, None), (None, 0.5)]
ALL: list[Setting] = [
    *FEW,
    ("search", "search"),
    *((a, 0.5) for a in ALPHAS),
    *((a, None) for a in ALPHAS),
    *((None, a) for a in ALPHAS),
]
ALL += [(0.7, a) for a in ALPHAS]
SETTINGS = {"int8-dynamic": ALL, "int8-static": FEW, "fp8-dynamic": FEW, "fp8-static": FEW}
WINDOWS, CALIBRATION = 8, 4


class Demo:
    """The demo model, text to calibrate and to judge on, and the float model's predictions.

    Windows have 512 tokens; those to judge on begin behind ``skipped`` ones, and both kinds are spread over their half.
    """

    def __init__(self, windows: int = WINDOWS, calibration: int = CALIBRATION, skipped: int | None = None) -> None:
        source = open_model("demo")
        self.model: nn.Module = source.model.eval()
        halves = text.split(text.read_text(None))
        seen, judged = (text.windows(source.tokenizer, half, 512) for half in halves)
        if skipped is None:  # the first ones
            self.judge, seen = judged[:windows], seen[:calibration]
        else:
            self.judge, seen = spread(judged[skipped:], windows), spread(seen, calibration)
        self.batches = [{"input_ids": part} for part in seen.split(min(4, max(1, len(seen) // 2)))]
        self.exact = [self.predictions(self.model, ids).bfloat16() for ids in self.judge]
        self.losses, _ = self.distances(self.model)
        self.base = math.exp(fmean(self.losses))

    @torch.no_grad()
    def predictions(self, model: Any, ids: Tensor) -> Tensor:
        """Log probabilities [tokens − 1, vocabulary]."""
        return F.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), dim=-1)

    def distances(self, model: nn.Module) -> tuple[list[float], list[float]]:
        """By window the loss, and the KL divergence from the float model's predictions, in nats a token."""
        losses, divergences = [], []
        for ids, exact in zip(self.judge, self.exact, strict=True):
            found, wide = self.predictions(model, ids), exact.float()
            losses.append(float(F.nll_loss(found, ids[1:])))
            divergences.append(float((wide.exp() * (wide - found)).sum(1).mean()))
        return losses, divergences

    def distance(self, model: nn.Module) -> dict[str, float]:
        """The perplexity, and the mean KL divergence."""
        losses, divergences = self.distances(model)
        return {"perplexity": math.exp(fmean(losses)), "kl": fmean(divergences)}

    def row(self, scheme: str, setting: Setting) -> dict[str, Any]:
        """One scheme with these α."""
        norms, down = setting
        rules = [ov.Rule(scheme, "*.down_proj", smooth=down), ov.Rule(scheme, smooth=norms)]  # type: ignore[arg-type]
        twin = copy.deepcopy(self.model)
        summary = ov.quantize_(twin, rules, self.batches)
        found = self.distance(twin)
        found["change"] = 100 * (found["perplexity"] / self.base - 1)
        alphas = [] if summary.smoothing is None else [pair.alpha for pair in summary.smoothing.pairs]
        return {**found, "alphas": alphas}


def spread(windows: Tensor, count: int) -> Tensor:
    """So many of the windows, evenly apart."""
    return windows[:: max(1, len(windows) // count)][:count]


def page(results: dict[str, Any]) -> str:
    """docs/smoothing.md."""
    parts = []
    for scheme in SETTINGS:
        rows = [[*key.split("/")[1:], row] for key, row in results["rows"].items() if key.startswith(f"{scheme}/")]
        if rows:
            table = [[n, d, f"{r['change']:+.2f} %", f"{1000 * r['kl']:.2f}"] for n, d, r in rows]
            head = ["α of norms", "α of up → down", "perplexity", "KL, nats / 1000"]
            parts.append(f"## {scheme}\n\n{markdown(head, table)}\n")
    return f"""# Smoothing

Made by `python -m benchmarks.smoothing`. SmolLM2-135M-Instruct in FP32, calibrated on {CALIBRATION} windows of 512
tokens of one half of Python's documentation, judged on {results["windows"]} of the other. {results["machine"]}.
Perplexity: its rise over {results["float"]:.3f}. KL: the mean distance from the float model's predictions, which
scatters less than the perplexity and orders the rows better. A dash: not smoothed.

Weights in INT8 with a scale a channel cost this model nothing: what hurts are the inputs. SmoothQuant moves what makes
them hard into the weights, for the layers behind norms and for `down_proj`, whose inputs hold massive activations and
scale with the rows of `up_proj`. Both add up.

{chr(10).join(parts)}"""


def main(schemes: list[str]) -> None:
    """Measure what is not there yet, and write docs/."""
    here = machine.examine(rows=(), repeats=0)
    torch.manual_seed(0)
    demo = Demo()
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    results |= {"float": demo.base, "windows": WINDOWS, "machine": f"{here.processor}; torch {here.torch}"}
    for scheme in schemes or SETTINGS:
        for setting in SETTINGS[scheme]:
            key = "/".join([scheme, *("–" if a is None else str(a) for a in setting)])
            if key not in results["rows"]:
                results["rows"][key] = demo.row(scheme, setting)
                print(key, results["rows"][key]["change"], results["rows"][key]["kl"], flush=True)
                FILE.write_text(json.dumps(results, indent=1) + "\n")
    FILE.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main(sys.argv[1:])
