"""What outliers do to 8 bits on the demo model, what taking them out costs, and what they are good for.

``python -m benchmarks.outliers [planted | speed | ablation …]`` measures these, all if none is named, and writes them
into docs/outliers.md and .json beside what is there. ``planted``: outliers in six channels of every norm, which leave
the function as it is, and what each scheme makes of them. ``speed``: bfloat16, a prefill of 512 tokens and tokens one
by one, LLM.int8() against the same INT8 without it, in turns. ``ablation``: LLM.int8()'s test (2208.07339) on the
dimensions that are outliers by its criterion, set to zero in the inputs of all layers that read the hidden state,
against as many random ones.
"""

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo as ov
from benchmarks.measure import markdown, timed
from octavo.analysis import machine
from octavo.analysis.ablation import attention_peak, without
from octavo.analysis.outliers import find_outliers
from octavo.analysis.perplexity import perplexity
from octavo.analysis.planting import plant_outliers_
from octavo.io import text
from octavo.io.huggingface import open_model

FILE = Path(__file__).resolve().parent.parent / "docs" / "outliers.json"
LENGTH, WINDOWS, DRAWS = 256, 4, 3
SCHEMES = ("int8-dynamic", "llm-int8")


PLANTED, CHANNELS, SIZE = 8, 6, 60.0  # windows of 512 to judge on; what is planted
WAYS: dict[str, Any] = {
    "INT8 dynamic, naive": "int8-dynamic",
    "LLM.int8()": "llm-int8",
    "SmoothQuant, α 0.5": [ov.Rule("int8-dynamic", smooth=0.5)],
    "E4M3 dynamic": "fp8-dynamic",
    "INT8, weights only": "int8-weight-only",
}
Section = dict[str, Any]  # a table's "head" and "rows", and a "note" below it


def windows(tokenizer: Any, count: int, length: int) -> torch.Tensor:
    """Python's documentation, as tokens [count, length]."""
    return text.windows(tokenizer, text.default_text(), length, count)


def planted() -> Section:
    """Losses before and after outliers are planted, and the share of the naive scheme's that each way recovers."""
    source = open_model("demo", torch.float32)
    halves = text.split(text.read_text(None))
    judged = text.windows(source.tokenizer, halves[1], 512, PLANTED)
    data = [{"input_ids": part} for part in text.windows(source.tokenizer, halves[0], 512, 4).split(2)]
    models = [source.model, copy.deepcopy(source.model)]
    plant_outliers_(models[1], data[0], CHANNELS, SIZE)
    losses = {"float": tuple(perplexity(model, judged).loss for model in models)}
    for name, rules in WAYS.items():
        pair = []
        for model in models:
            small = copy.deepcopy(model)
            ov.quantize_(small, rules, data if name.startswith("SmoothQuant") else None)
            pair.append(perplexity(small, judged).loss)
        losses[name] = tuple(pair)
        print(name, pair, flush=True)
    (_, exact), (_, naive) = losses["float"], losses["INT8 dynamic, naive"]
    rows = [
        [
            name,
            f"{math.exp(own):.2f}",
            f"{math.exp(hurt):.2f}",
            f"{hurt - exact:+.4f}",
            f"{recovered(naive, hurt, exact):.1f} %",
        ]
        for name, (own, hurt) in losses.items()
    ]
    head = ["scheme", "perplexity", "with outliers planted", "nats lost", "of the naive loss recovered"]
    return {"head": head, "rows": rows}


def recovered(naive: float, loss: float, exact: float) -> float:
    """How much of what the naive scheme lost another one keeps, in percent."""
    return 100 * (naive - loss) / (naive - exact)


@torch.no_grad()
def speed() -> Section:
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
    note = f"{large} of {whole} layers have outliers in this prefill."
    return {"head": ["what", "scheme", "ms", "spread", "× int8-dynamic"], "rows": rows, "note": note}


@torch.no_grad()
def ablation() -> Section:
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
    return {"head": ["taken away", "dimensions", "perplexity", "largest attention probability"], "rows": rows}


def _within(model: nn.Module, name: str) -> bool:
    """Whether this is no output head, which the paper leaves alone."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return model.get_submodule(name) is not head


SECTIONS: dict[str, tuple[str, Callable[[], Section]]] = {
    "planted": (
        f"""Outliers planted

{CHANNELS} channels of every norm that only linear layers read have outliers of about {SIZE:g}: their gains are
multiplied by powers of two and the weights that read them divided, which changes no bit of the float model
(`analysis/planting.py`). Judged on {PLANTED} windows of 512 tokens of Python's documentation; SmoothQuant has seen four
of its other half. Recovered: (naive − scheme) / (naive − float), in nats a token. Scales of α 0.5 follow a planted
factor exactly, so that SmoothQuant undoes it to the last digit.""",
        planted,
    ),
    "speed": (
        """What taking outliers out costs

In bfloat16. LLM.int8() multiplies the columns above 6 in 16 bits and the rest as INT8 dynamic does.""",
        speed,
    ),
    "ablation": (
        """What outliers are good for

The model's own outlier dimensions, set to zero or clipped in the inputs of all layers that read the hidden state,
against as many random ones.""",
        ablation,
    ),
}


def shown(section: Section) -> str:
    """A section's table and note as Markdown."""
    return "\n\n".join([markdown(section["head"], section["rows"]), *filter(None, [section.get("note")])])


def page(results: dict[str, Any]) -> str:
    """docs/outliers.md."""
    sections = [f"## {told}\n\n{shown(results[key])}\n" for key, (told, _) in SECTIONS.items() if key in results]
    return f"""# Outliers

Made by `python -m benchmarks.outliers` on SmolLM2-135M-Instruct. {results["machine"]}.

{chr(10).join(sections)}"""


def main(chosen: list[str]) -> None:
    """Measure, print, write."""
    here = machine.examine(rows=(), repeats=0)
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    results["machine"] = f"{here.processor}; torch {here.torch}"
    for what in chosen or SECTIONS:
        results[what] = SECTIONS[what][1]()
        print(shown(results[what]), flush=True)
        FILE.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        FILE.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main(sys.argv[1:])
