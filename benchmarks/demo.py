"""The demo model in every scheme: bytes, perplexity, seconds, peak memory, and what transformers makes of the folder.

The text is the evaluation half of Python's own documentation; the windows are those of ``octavo evaluate``. Each scheme
runs in a process of its own, so that peak memory is its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import octavo as ov
from benchmarks.measure import markdown
from octavo.io import checkpoint, text
from octavo.io.huggingface import open_model

SCHEMES = tuple(name for name, scheme in ov.schemes.NAMES.items() if not scheme.static)  # those: calibration.py


def memory(field: str) -> float:
    """A line of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def one(scheme: str, count: int, compare: bool) -> dict[str, Any]:
    """Everything about one scheme ("float" for none)."""
    before_loading = memory("VmRSS")
    source = open_model("demo")
    model, tokenizer = source.model, source.tokenizer
    windows = text.windows(tokenizer, text.split(text.read_text(None))[1], 512, count)
    result: dict[str, Any] = {"scheme": scheme}
    bytes_float = sum(t.nbytes for t in {p.data_ptr(): p for p in model.parameters()}.values()) / 1e6
    if scheme != "float":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        started = time.perf_counter()
        summary = ov.quantize_(model, scheme)
        result |= {
            "quantize_seconds": time.perf_counter() - started,
            "quantize_peak_over_float": (memory("VmHWM") - before_loading) / bytes_float,
            "mb": summary.bytes_after / 1e6,
        }
    else:
        result["mb"] = bytes_float
    started = time.perf_counter()
    result["perplexity"] = ov.perplexity(model, windows).value
    result["evaluate_seconds"] = time.perf_counter() - started
    layout = checkpoint.layout_for(model)[0] if scheme != "float" else ""
    result["layout"] = layout
    if compare and layout == "compressed-tensors":
        result |= agreement(model, tokenizer, windows)
    return result


@torch.no_grad()
def agreement(model: Any, tokenizer: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Save, reload with octavo and with transformers, and compare; with what a change of 1e-7 in the input does."""
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        ov.save(model, target, tokenizer=tokenizer)
        again = ov.load(target)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
        ids = windows[:2]
        logits = model(input_ids=ids).logits
        same = torch.equal(logits, again(input_ids=ids).logits)
        quality = ov.sqnr(logits, theirs(input_ids=ids).logits)
        embedded = model.get_input_embeddings()(ids)
        nudge = 1 + 1e-7 * torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
        floor = ov.sqnr(logits, model(inputs_embeds=embedded * nudge).logits)
        layers = dict(model.named_modules())
        weights = all(
            torch.equal(layers[name].weight, module.weight)
            for name, module in theirs.named_modules()
            if isinstance(layers.get(name), ov.nn.QuantizedLinear)
        )
        return {
            "octavo_load_identical": same,
            "transformers_weights_identical": weights,
            "transformers_logit_sqnr": quality,
            "sqnr_of_a_1e-7_nudge": floor,
            "transformers_perplexity": ov.perplexity(theirs, windows).value,
        }


def run(count: int = 16, compare: bool = True) -> dict[str, Any]:
    """All schemes, printed as a table."""
    results = {}
    for scheme in ("float", *SCHEMES):
        call = f"one({scheme!r}, {count}, {compare})"
        code = f"import json; from benchmarks.demo import one; print('\\n' + json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{scheme}: {done.stderr[-2000:]}")
        results[scheme] = json.loads(done.stdout.splitlines()[-1])
        print(f"{scheme}: {results[scheme]['perplexity']:.3f}", file=sys.stderr, flush=True)
    base = results["float"]["perplexity"]
    rows = []
    for scheme, r in results.items():
        change = f"{100 * (r['perplexity'] / base - 1):+.2f} %" if scheme != "float" else ""
        layout = r["layout"].replace("octavo", "octavo only")
        rows.append([scheme, f"{r['mb']:.0f}", f"{r['perplexity']:.3f}", change, layout])
    print(markdown(["scheme", "MB", "perplexity", "change", "layout"], rows), "\n")
    rows = [
        [
            scheme,
            f"{r['quantize_seconds']:.1f}",
            f"{r['quantize_peak_over_float']:.2f} ×",
            *(
                [
                    "yes" if r["octavo_load_identical"] else "NO",
                    "yes" if r["transformers_weights_identical"] else "NO",
                    f"{r['transformers_logit_sqnr']:.1f}",
                    f"{r['sqnr_of_a_1e-7_nudge']:.1f}",
                    f"{100 * (r['transformers_perplexity'] / r['perplexity'] - 1):+.2f} %",
                ]
                if "octavo_load_identical" in r
                else [""] * 5
            ),
        ]
        for scheme, r in results.items()
        if scheme != "float"
    ]
    header = ["scheme", "quantize s", "peak memory / FP32 model", "octavo.load: same logits"]
    header += ["transformers: same weights", "its logits, dB", "1e-7 nudge, dB", "its perplexity"]
    print(markdown(header, rows))
    return results
