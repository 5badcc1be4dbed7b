"""A small language model with planted outliers, quantized in the ways of LLM.int8() and its baselines."""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import octavo as ov
from octavo.analysis.experiment import Plot, Result, Series, Table
from octavo.analysis.outliers import find_outliers
from octavo.analysis.planting import plant_outliers_

INT8, UINT8 = ov.formats.INT8, ov.formats.UINT8
TENSOR, ROWS, TOKENS = ov.Cast(INT8), ov.Cast(INT8, ov.PerChannel(0)), ov.Cast(INT8, ov.PerToken())
ZERO = ov.Cast(UINT8, affine=True)
ZERO_ROWS, ZERO_TOKENS = ov.Cast(INT8, ov.PerChannel(0), affine=True), ov.Cast(UINT8, ov.PerToken(), affine=True)
#: The paper's baselines, weight and input. Without outliers the later ones are the finer ones.
PLAIN = {
    "absmax": (TENSOR, TENSOR),
    "zero point": (ov.Cast(INT8, affine=True), ZERO),
    "row-wise": (TENSOR, TOKENS),
    "vector-wise": (ROWS, TOKENS),
    "zero point, vector-wise": (ZERO_ROWS, ZERO_TOKENS),
}


class Block(nn.Module):
    """A transformer's layer, norms first."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.before(x)
        q, k, v = (one(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Model(nn.Module):
    """A language model of bytes."""

    def __init__(self, width=128, layers=3, heads=4, length=64):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return self.lm_head(self.norm(self.blocks(x)))


def python_source():
    """Bytes of Python's own library, which lies wherever this runs: what to learn, and what to be tested on."""
    folder = Path(copy.__file__).parent
    learn, test = (
        b"".join((folder / name).read_bytes() for name in names)
        for names in (("argparse.py", "ast.py", "calendar.py", "dataclasses.py"), ("difflib.py",))
    )
    return tuple(torch.frombuffer(bytearray(one), dtype=torch.uint8).long() for one in (learn, test))


def windows(text, count, length, generator):
    """Some windows of the text, [count, length]."""
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts])


def loss(model, ids):
    """Nats a byte."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model, text, steps, track, generator, batch=16, length=64):
    """Adam, a warm-up and a cosine: enough to know what Python looks like."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in track(list(range(steps)), "training"):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss(model, windows(text, batch, length, generator)).backward()
        optimizer.step()
    return model.eval()


def ways(threshold=6.0, smooth=True):
    """By name, what makes a float model an 8-bit one in place; ``data`` is for smoothing."""
    found = {name: ov.Scheme(*casts) for name, casts in PLAIN.items()}
    apart = {f"{name} + decomposition": ov.Scheme(*casts, threshold) for name, casts in PLAIN.items()}
    found |= {"LLM.int8()" if name == "vector-wise + decomposition" else name: way for name, way in apart.items()}
    found["E4M3"] = ov.schemes.FP8_DYNAMIC
    found["INT8, weights only"] = ov.schemes.INT8_WEIGHT_ONLY
    return {**found, **({"SmoothQuant": [ov.Rule("int8-dynamic", smooth=0.5)]} if smooth else {})}


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    model=None,
    steps=300,
    channels=2,
    size=2000.0,
    threshold=6.0,
    test_windows=64,
) -> Result:
    """The loss of each way, before outliers were planted and after; ``model``: a model of bytes of your own."""
    if quick:
        steps, test_windows = min(steps, 60), min(test_windows, 16)
    generator = torch.Generator().manual_seed(seed)
    learn, test = python_source()
    if model is None:
        torch.manual_seed(seed)
        model = train(Model(), learn, steps, track, generator)
    data, judged = windows(learn, 16, 64, generator), windows(test, test_windows, 64, generator)
    planted = copy.deepcopy(model)
    factors = plant_outliers_(planted, data, channels, size, generator=generator)
    before, after = find_outliers(model, [data]), find_outliers(planted, [data])
    with torch.no_grad():
        exact, same = float(loss(model, judged)), float(loss(planted, judged))
        losses = {"float": (exact, same)}
        candidates = ways(threshold)
        for name in track(list(candidates), "quantizing"):
            pair = []
            for one in (model, planted):
                small = copy.deepcopy(one)
                ov.quantize_(small, candidates[name], [data] if name == "SmoothQuant" else None)
                pair.append(float(loss(small, judged)))
            losses[name] = tuple(pair)
    lost = {name: planted_loss - same for name, (_, planted_loss) in losses.items()}
    naive = lost["vector-wise"]
    values = {
        "planting changes the loss by": abs(same - exact),
        "outlier dimensions before": len(before.systematic),
        "outlier dimensions after": len(after.systematic),
        **{f"{name}: nats lost": nats for name, nats in lost.items()},
        **{f"{name}: nats lost without outliers": own - exact for name, (own, _) in losses.items()},
        **{f"{name}: % of vector-wise's loss recovered": 100 * (1 - nats / naive) for name, nats in lost.items()},
    }
    order = ("LLM.int8()", "zero point, vector-wise", "vector-wise", "zero point", "absmax")
    values["steps of the paper's order that hold"] = sum(
        lost[a] < lost[b] for a, b in zip(order, order[1:], strict=False)
    )
    plain = [name for name in PLAIN if name != "vector-wise"]
    worse = [lost[f"{name} + decomposition"] < lost[name] for name in plain]
    values["baselines that decomposition mends"] = sum(worse) + (lost["LLM.int8()"] < naive)
    shown = list(losses)
    return Result(
        values,
        tables=[
            Table(
                "ways",
                f"Perplexity of a byte; {channels} channels of every norm carry outliers of about {size:g}",
                ("way", "without outliers", "with outliers", "% of vector-wise's loss recovered"),
                [
                    (n, *(math.exp(x) for x in losses[n]), values[f"{n}: % of vector-wise's loss recovered"])
                    for n in shown
                ],
            ),
            Table(
                "inputs",
                "What enters the layers: largest magnitude and crest factor of a token, before and after",
                ("input", "largest", "crest", "largest, planted", "crest, planted"),
                [
                    (a.names[0], a.largest, a.token_crest, b.largest, b.token_crest)
                    for a, b in zip(before.of_layers, after.of_layers, strict=True)
                ],
            ),
        ],
        plots=[
            Plot(
                "lost",
                "What 8 bits cost a model with outliers",
                "",
                "nats a byte",
                [
                    Series("without outliers", shown[1:], [losses[n][0] - exact for n in shown[1:]]),
                    Series("with outliers", shown[1:], [lost[n] for n in shown[1:]]),
                ],
                kind="bars",
            )
        ],
        notes=[f"planted: {line}" for line in str(factors).splitlines()[:2]],
    )
