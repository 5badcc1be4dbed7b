"""``python -m benchmarks.kv_cache``: what keys and values, and attention's products, cost in 8 bits at 4,096 tokens.

Writes docs/kv-cache.md. The model is SmolLM2-135M-Instruct in bfloat16; the text is Python's own documentation, the
half that nothing was calibrated on. A window is fed in stretches of 512 tokens, so that all but the first of them
attend to what the cache has kept. Static scales are the largest magnitudes of the other half.
"""

import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from benchmarks.measure import markdown
from octavo.analysis import machine
from octavo.core.cast import Cast
from octavo.core.granularity import PerChannel, PerTensor, PerToken
from octavo.core.scaling import Constant, Static
from octavo.io import text
from octavo.io.huggingface import open_model
from octavo.nn.attention import PROBABILITIES, quantize_attention_, restore_attention_
from octavo.nn.kv_cache import KVCache
from octavo.nn.kv_calibration import calibrate_kv_cache_

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kv-cache.md"
LENGTH, STRETCH, WINDOWS = 4096, 512, 2
CALIBRATION, STEPS = 4, 15  # windows of 1,024 tokens; tokens written one by one

INT8, E4M3, E5M2, E3M4 = (Cast(name, PerToken()) for name in ("int8", "e4m3fn", "e5m2", "e3m4"))
CACHES = {  # keys, values
    "INT8, a scale a token and head": (INT8, INT8),
    "INT8, static, a scale a head": (Cast("int8", PerChannel(1), Static()),) * 2,
    "E3M4, a scale a token and head": (E3M4, E3M4),
    "keys INT8, values E4M3FN, likewise": (INT8, E4M3),
    "E4M3FN, a scale a token and head": (E4M3, E4M3),
    "E4M3FN, static, a scale a head": (Cast("e4m3fn", PerChannel(1), Static()),) * 2,
    "E4M3FN, static, one scale": (Cast("e4m3fn", PerTensor(), Static()),) * 2,
    "E5M2, a scale a token and head": (E5M2, E5M2),
}
PRODUCTS = {  # query, key, probabilities, value
    "Q, K and V INT8 a token, P E4M3FN 1/448": (INT8, INT8, PROBABILITIES, INT8),
    "Q, K and V E4M3FN a token, P E4M3FN 1/448": (E4M3, E4M3, PROBABILITIES, E4M3),
    "all INT8, P UINT8 a row": (INT8, INT8, Cast("uint8", PerToken()), INT8),
    "all INT8, P UINT8 1/255": (INT8, INT8, Cast("uint8", scale=Constant(1 / 255)), INT8),
}


@torch.no_grad()
def loss(model: Any, windows: torch.Tensor, make: Any) -> tuple[float, Any, float]:
    """Nats a token over the windows, the cache of the last of them, and the seconds it took."""
    total, cache, started = 0.0, None, time.perf_counter()
    for ids in windows.split(1):
        cache = make()
        for at in range(0, LENGTH, STRETCH):
            part, following = ids[:, at : at + STRETCH], ids[0, at + 1 : at + STRETCH + 1]
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0, : len(following)]
            total += F.cross_entropy(logits.float(), following, reduction="sum").item()
    return total / (len(windows) * (LENGTH - 1)), cache, time.perf_counter() - started


@torch.no_grad()
def step_seconds(model: Any, caches: dict[str, Any], token: torch.Tensor) -> dict[str, float]:
    """Median seconds to write one more token with each cache, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(STEPS):
        for name, cache in caches.items():
            started = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def nbytes(cache: Any) -> int:
    """Bytes of keys and values."""
    if isinstance(cache, KVCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def run(count: int = WINDOWS) -> dict[str, Any]:
    """Every cache and every product."""
    source = open_model("demo", torch.bfloat16)
    model = source.model
    learn, judge = text.split(text.read_text(None))
    windows = text.windows(source.tokenizer, judge, LENGTH, count)
    samples = text.windows(source.tokenizer, learn, 1024, CALIBRATION).split(1)
    plain = partial(DynamicCache, config=model.config)
    base = "bfloat16"
    losses: dict[str, float] = {}
    caches: dict[str, Any] = {}

    def note(name: str, nats: float, seconds: float) -> None:
        losses[name] = nats
        print(f"{name}: perplexity {math.exp(nats):.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    nats, caches[base], seconds = loss(model, windows, plain)
    note(base, nats, seconds)
    for name, casts in CACHES.items():
        if isinstance(casts[0].scale, Static):
            calibrate_kv_cache_(model, samples, *casts)
        nats, caches[name], seconds = loss(model, windows, lambda casts=casts: KVCache(model, *casts))
        note(name, nats, seconds)
    sizes = {name: nbytes(cache) for name, cache in caches.items()}
    steps = step_seconds(model, caches, windows[:1, :1])
    first = windows[:1]
    nats, _, seconds = loss(model, first, plain)
    note("bfloat16 products", nats, seconds)
    for name, casts in PRODUCTS.items():
        quantize_attention_(model, *casts)
        nats, _, seconds = loss(model, first, plain)
        note(name, nats, seconds)
        restore_attention_(model)
    float32 = open_model("demo", torch.float32).model
    nats, _, seconds = loss(float32, windows, lambda: DynamicCache(config=float32.config))
    note("float32 model and cache", nats, seconds)
    return {"windows": len(windows), "losses": losses, "bytes": sizes, "steps": steps, "base": base}


def page(results: dict[str, Any]) -> str:
    """docs/kv-cache.md."""
    losses, sizes, steps, base = (results[key] for key in ("losses", "bytes", "steps", "base"))

    def change(name: str, against: str) -> str:
        return "" if name == against else f"{100 * math.expm1(losses[name] - losses[against]):+.2f} %"

    def row(name: str) -> list[str]:
        size, speed = sizes[name] / sizes[base], steps[name] / steps[base]
        return [name, f"{math.exp(losses[name]):.3f}", change(name, base), f"{size:.3f}", f"{speed:.2f}"]

    against = "bfloat16 products"
    products = [[n, f"{math.exp(losses[n]):.3f}", change(n, against)] for n in (against, *PRODUCTS)]
    exact = "float32 model and cache"
    here = machine.examine(rows=(), repeats=0)
    return "\n".join(
        [
            "# Keys, values and attention in 8 bits",
            f"Made by `python -m benchmarks.kv_cache`. {(__doc__ or '').split('docs/kv-cache.md. ')[1].strip()}\n",
            f"{here.processor}; {here.threads} threads; torch {here.torch}.\n",
            "```python",
            *EXAMPLE.strip().splitlines(),
            "```\n",
            "## The cache\n",
            f"{results['windows']} windows of {LENGTH:,} tokens. Bytes are those of codes and scales, and of the room "
            "made for tokens to come, as a part of the bfloat16 cache's. Time is that of one more token after the last "
            f"window, the median of {STEPS}, in turns; this machine is shared, so take it for a rough figure.\n",
            markdown(
                ["cache", "perplexity", "change", "bytes / bfloat16", "time a token / bfloat16"],
                [row(name) for name in sizes]
                + [[exact, f"{math.exp(losses[exact]):.3f}", change(exact, base), "2.000", ""]],
            ),
            "\n" + CACHE_WORDS.strip() + "\n",
            "## The products\n",
            "The first window, with a bfloat16 cache; the two products of every attention in 8 bits.\n",
            markdown(["Q·Kᵀ and P·V", "perplexity", "change"], products),
            "\n" + PRODUCT_WORDS.strip() + "\n",
        ]
    )


EXAMPLE = """
import octavo as ov
from octavo.io.huggingface import open_model

source = open_model("demo")
inputs = source.tokenizer("8-bit numbers are", return_tensors="pt")
cache = ov.KVCache(source.model)  # INT8 with a scale a token and head; any Cast of 8 bits, for keys and values apart
source.model.generate(**inputs, past_key_values=cache, max_new_tokens=8)
print(cache.nbytes)
"""
CACHE_WORDS = """
A scale a token and head costs two bytes beside the 64 codes of a head here, 3 % (1.6 % where heads have 128 numbers);
static scales cost nothing, and are what engines read from a checkpoint. It is the keys that want a fine grid: some of
their channels are large in every token, three bits of mantissa (E4M3FN) leave those an error of up to 6 %, and scores
are sums that it dominates. Values are content with E4M3FN. Every step of generation turns the whole cache into bfloat16
again, one pass over the codes; transformers' own cache copies all it holds at every step as well.
"""
PRODUCT_WORDS = """
Probabilities over thousands of tokens are mostly smaller than half of 1/255, and an even grid of that step drops them:
the row sums no longer reach one. A scale a row helps, and a float grid keeps small numbers in proportion.
"""


def main() -> None:
    """Measure, print, and write the page."""
    torch.manual_seed(0)
    content = page(run())
    print(content)
    PAGE.write_text(content)


if __name__ == "__main__":
    main()
