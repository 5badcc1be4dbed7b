"""What rounding weights by data wins back on the demo model, and what of it is following the float model's results.

``python -m benchmarks.rounding [windows to calibrate with] [windows to judge by]`` writes docs/rounding.md and .json.
Text is Python's own documentation: one half calibrates, the other judges.
"""

import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import octavo as ov
from benchmarks.measure import markdown
from octavo.analysis import machine
from octavo.io import text
from octavo.io.huggingface import open_model
from octavo.nn import swap
from octavo.ptq.gptq import GPTQ
from octavo.ptq.quantize import check
from octavo.ptq.rounding import Job, round_weights

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEMES = ("int8-dynamic", "fp8-dynamic", "int8-weight-only", "fp8-weight-only")
WAYS: dict[str, GPTQ | None] = {
    "nearest": None,
    "GPTQ, for the same weights": GPTQ(follow=False),
    "GPTQ, following the float model": GPTQ(),
}


def rounded(model: Any, scheme: str, batches: Sequence[Any], how: GPTQ | None) -> tuple[Any, float]:
    """A copy of the model under the scheme, and the seconds that rounding took."""
    twin, started = copy.deepcopy(model), time.perf_counter()
    if how is None:
        ov.quantize_(twin, scheme)
        return twin, time.perf_counter() - started
    jobs = []
    for layer, verdict in check(twin, scheme).items():
        if isinstance(verdict, ov.Scheme):

            def nearest(matrix: Any, verdict: ov.Scheme = verdict) -> tuple[ov.Scheme, ov.QTensor]:
                return verdict, ov.quantize(matrix, verdict.weight)

            jobs.append(Job(layer, nearest, {}, True))
    found = round_weights(twin, jobs, batches, how)
    for job in jobs:
        layer, (scheme_of_it, weight) = job.layer, found[job.layer.name]
        swap.replace(twin, layer, layer.eight_bit.replacing(layer.module, weight, scheme_of_it))
    return twin, time.perf_counter() - started


def page(results: dict[str, Any]) -> str:
    """docs/rounding.md."""
    rows = [
        [scheme, *(f"{results['loss'][scheme][way]:+.2f}" for way in WAYS), f"{results['seconds'][scheme]:.0f}"]
        for scheme in results["loss"]
    ]
    return f"""# Rounding weights by data

Made by `python -m benchmarks.rounding`. SmolLM2-135M-Instruct in FP32, {results["calibration"]} windows of 512 tokens
of one half of Python's documentation to round by, {results["windows"]} of the other to judge on. {results["machine"]}.
Losses are the rise of the perplexity over {results["float"]:.3f}, in percent; seconds are those of the last way.

{markdown(["scheme", *WAYS, "seconds"], rows)}

GPTQ rounds a column after the other, each making up for those before it. *For the same weights* it comes near to what
the float weights would make of the same 8-bit inputs; *following the float model* it comes near to what the float model
makes of its own inputs, as far as one half of the data confirms what the other half shows.
"""


def main() -> None:
    """Measure, print, write."""
    calibration, windows = (int(given) for given in (sys.argv[1:] + ["32", "16"][len(sys.argv) - 1 :])[:2])
    source = open_model("demo")
    halves = text.split(text.read_text(None))
    ids = text.windows(source.tokenizer, halves[0], 512)
    ids = ids[:: max(1, len(ids) // calibration)][:calibration]
    batches = [{"input_ids": part} for part in ids.split(4)]
    judge = text.windows(source.tokenizer, halves[1], 512, windows)
    base = ov.perplexity(source.model, judge).value
    results: dict[str, Any] = {"float": base, "calibration": len(ids), "windows": len(judge), "loss": {}, "seconds": {}}
    here = machine.examine(rows=(), repeats=0)
    results["machine"] = f"{here.processor}; {here.threads} threads; torch {here.torch}"
    for scheme in SCHEMES:
        for way, how in WAYS.items():
            twin, seconds = rounded(source.model, scheme, batches, how)
            loss = 100 * (ov.perplexity(twin, judge).value / base - 1)
            results["loss"].setdefault(scheme, {})[way] = loss
            results["seconds"][scheme] = seconds
            print(f"{scheme:20} {way:34} {loss:+.2f} % in {seconds:.0f} s", flush=True)
    DOCS.joinpath("rounding.json").write_text(json.dumps(results, indent=1) + "\n")
    DOCS.joinpath("rounding.md").write_text(page(results))


if __name__ == "__main__":
    main()
