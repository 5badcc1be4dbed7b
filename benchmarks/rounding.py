"""What rounding weights by data wins back on the demo model, and what of it is following the float model's results.

``python -m benchmarks.rounding [windows to calibrate with] [windows to judge by]`` writes docs/rounding.md and .json.
Text is Python's own documentation: one half calibrates, the other judges, behind the windows that settings were chosen
by. Rows are kept as they come and not measured again for the same windows: remove the .json to begin anew.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import octavo as ov
from benchmarks.measure import markdown
from benchmarks.smoothing import Demo
from octavo.analysis import machine
from octavo.nn import swap
from octavo.ptq.gptq import GPTQ
from octavo.ptq.quantize import check
from octavo.ptq.rounding import Job, round_weights

FILE = Path(__file__).resolve().parent.parent / "docs" / "rounding.json"
TUNED_BY = 8  # windows of the judging half that dampings and shares were chosen by
SCHEMES = ("int8-dynamic", "fp8-dynamic", "int8-weight-only", "fp8-weight-only")
WAYS: dict[str, GPTQ | None] = {
    "nearest": None,
    "GPTQ, for the same weights": GPTQ(follow=False),
    "GPTQ, following the float model": GPTQ(),
}


def rounded(model: Any, scheme: str, batches: Sequence[Any], how: GPTQ | None) -> tuple[Any, float]:
    """A copy of the model under the scheme, and the seconds of processor time that it took."""
    twin, started = copy.deepcopy(model), time.process_time()
    if how is None:
        ov.quantize_(twin, scheme)
        return twin, time.process_time() - started
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
    return twin, time.process_time() - started


def page(results: dict[str, Any]) -> str:
    """docs/rounding.md."""
    rows = [
        [
            *key.split("/"),
            f"{row['rise']:+.2f} ± {row['error']:.2f} %",
            f"{1000 * row['kl']:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for key, row in results["rows"].items()
    ]
    head = ["scheme", "rounding", "perplexity", "KL, nats / 1000", "seconds"]
    return f"""# Rounding weights by data

Made by `python -m benchmarks.rounding`. SmolLM2-135M-Instruct in FP32, {results["calibration"]} windows of 512 tokens
of one half of Python's documentation to round by, {results["windows"]} of the other to judge on: none of those that
settings were chosen by. {results["machine"]}. Perplexity: its rise over {results["float"]:.3f}, with the standard error
over windows. KL: the mean distance from the float model's predictions. Seconds: processor time of all of quantizing,
the passes over the data included.

{markdown(head, rows)}

GPTQ rounds a column after the other, each making up for those before it. *For the same weights* it comes near to what
the float weights would make of the same 8-bit inputs; *following the float model* it comes near to what the float model
makes of its own inputs, as far as one half of the data confirms what the other half shows. That needs the float model's
run beside the 8-bit one, hence its time.
"""


def row(demo: Demo, scheme: str, how: GPTQ | None) -> dict[str, float]:
    """One scheme, rounded in one way, against the float model window by window."""
    twin, seconds = rounded(demo.model, scheme, demo.batches, how)
    losses, divergences = demo.distances(twin)
    worse = [a - b for a, b in zip(losses, demo.losses, strict=True)]
    rise = math.exp(fmean(worse))
    error = 100 * rise * stdev(worse) / len(worse) ** 0.5 if len(worse) > 1 else math.nan
    return {"rise": 100 * (rise - 1), "error": error, "kl": fmean(divergences), "seconds": seconds}


def main() -> None:
    """Measure what is not there yet, print, write."""
    calibration, windows = (int(given) for given in (sys.argv[1:] + ["16", "16"][len(sys.argv) - 1 :])[:2])
    here = machine.examine(rows=(), repeats=0)
    demo = Demo(windows, calibration, skipped=TUNED_BY)
    counts = {"calibration": sum(len(b["input_ids"]) for b in demo.batches), "windows": len(demo.judge)}
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    same = math.isclose(kept.get("float", 0), demo.base, rel_tol=1e-4)  # the same text; sums differ by threads
    same = same and all(kept[key] == count for key, count in counts.items())
    results = {"float": demo.base, **counts, "rows": kept["rows"] if same else {}}
    results["machine"] = f"{here.processor}; {here.threads} threads; torch {here.torch}"
    for scheme in SCHEMES:
        for way, how in WAYS.items():
            if (key := f"{scheme}/{way}") not in results["rows"]:
                results["rows"][key] = row(demo, scheme, how)
                print(key, results["rows"][key], flush=True)
                FILE.write_text(json.dumps(results, indent=1) + "\n")
                FILE.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
