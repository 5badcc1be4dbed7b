"""``python -m benchmarks.outliers [speed | ablation]``: what taking outliers out costs, and what they are good for.

``speed``: SmolLM2-135M in bfloat16, a prefill of 512 tokens and tokens one by one, LLM.int8() against the same INT8
without it, in turns. ``ablation``: LLM.int8()'s test (2208.07339) on the dimensions that are outliers by its criterion,
set to zero in the inputs of all layers that read the hidden state, against as many random ones. Prints tables.
"""

import copy
import math
import sys
from typing import Any

import torch
from torch import nn

import octavo as ov
from benchmarks.measure import markdown, timed
from octavo.analysis.ablation import attention_peak, without
from octavo.analysis.outliers import find_outliers
from octavo.analysis.perplexity import perplexity
from octavo.io import text
from octavo.io.huggingface import open_model

LENGTH, WINDOWS, DRAWS = 256, 4, 3
SCHEMES = ("int8-dynamic", "llm-int8")


def windows(tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """Python's documentation, as tokens [count, length]."""
    return text.windows(tokenizer, text.default_text(), length, count)


@torch.no_grad()
def speed() -> str:
    """Median milliseconds and their ratios, and in how many layers there were outliers."""
    source = open_model("demo", torch.bfloat16)
    ids = windows(source.tokenizer, 1, 512)
    models = {"bfloat16": source.model}
    for scheme in SCHEMES:
        models[scheme] = copy.deepcopy(source.model)
        ov.quantize_(models[scheme], scheme)
    rows = []
    for name, repeats in (("prefill of 512", 9), ("a token after 512", 31)):
        ways = {}
        for scheme, model in models.items():
            if name.startswith("prefill"):
                ways[scheme] = lambda model=model: model(input_ids=ids, use_cache=False)
            else:
                cache = model(input_ids=ids, use_cache=True).past_key_values

                def step(model: Any = model, cache: Any = cache) -> None:
                    model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                    cache.crop(-1)

                ways[scheme] = step
        found = timed(ways, repeats, warm=2)
        base = found["int8-dynamic"].median
        for scheme, one in found.items():
            rows.append([name, scheme, f"{1e3 * one.median:.1f}", one.spread, f"{one.median / base:.2f}"])
    seen = find_outliers(source.model, [{"input_ids": ids}])
    large = sum(len(x.names) for x in seen.of_layers if x.dimensions)
    whole = sum(len(x.names) for x in seen.of_layers)
    table = markdown(["what", "scheme", "ms", "spread", "× int8-dynamic"], rows)
    return f"{table}\n\n{large} of {whole} layers have outliers in this prefill."


@torch.no_grad()
def ablation() -> str:
    """Perplexity and the mean largest attention probability without the outlier dimensions, and without random ones."""
    source = open_model("demo", torch.float32)
    model: Any = source.model
    model.set_attn_implementation("eager")
    ids = windows(source.tokenizer, 2 * WINDOWS, LENGTH)
    seen, judged = ids[:WINDOWS], ids[WINDOWS:]
    found = find_outliers(model, [{"input_ids": part} for part in seen.split(2)])
    outliers = [d.index for d in found.systematic]
    hidden = [n for x in found.of_layers if x.width == found.width for n in x.names if _within(model, n)]
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(found.width, generator=generator)[: len(outliers)].tolist() for _ in range(DRAWS)]
    rows = []
    for name, dimensions, how in (
        ("none", [], "zero"),
        ("outliers, set to zero", outliers, "zero"),
        ("outliers, clipped to 6", outliers, "clip"),
        *(("random ones, set to zero", draw, "zero") for draw in draws),
    ):
        with without(model, dict.fromkeys(hidden, dimensions), how):
            nats, peak = perplexity(model, judged).loss, attention_peak(model, judged)
        rows.append([name, ", ".join(map(str, dimensions)), f"{math.exp(nats):.2f}", f"{peak:.3f}"])
    return markdown(["taken away", "dimensions", "perplexity", "largest attention probability"], rows)


def _within(model: nn.Module, name: str) -> bool:
    """Whether this is no output head, which the paper leaves alone."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return model.get_submodule(name) is not head


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["speed", "ablation"]
    for what in chosen:
        print({"speed": speed, "ablation": ablation}[what](), flush=True)
