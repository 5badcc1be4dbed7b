"""Long sums in a short accumulator: plain, in chunks, and with stochastic rounding."""

import math

import torch

import octavo as ov
from octavo.analysis.experiment import Plot, Result, Series, Table

ACCUMULATOR = ov.formats.FP16_169


def ones_or_so(trials, length, generator):
    """Uniform with mean 1 and standard deviation 1."""
    return 1 + 3**0.5 * (2 * torch.rand(trials, length, generator=generator) - 1)


def total(x, accumulate, generator=None):
    """The sum of each row, as a product with ones: K ascending, rounded after every addition."""
    return ov.matmul(x, torch.ones(x.shape[1], 1), accumulate=accumulate, generator=generator)[:, 0]


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    accumulator=ACCUMULATOR,
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    chunks=(8, 16, 32, 64, 128),
    data=ones_or_so,
    trials=32,
    stochastic_trials=512,
    formats=(ov.formats.FP16_169, ov.formats.FP16, ov.formats.BF16),
) -> Result:
    """Sum ÷ exact for every length and way: the mean over ``trials`` vectors, and their spread."""
    if quick:
        lengths = [n for n in lengths if n <= 8192] or [min(lengths)]
        trials, stochastic_trials = min(trials, 8), min(stochastic_trials, 32)
    generator = torch.Generator().manual_seed(seed)
    x = data(max(trials, stochastic_trials), max(lengths), generator)
    ways = {"no chunk": ov.accumulate.Sequential(accumulator)}
    ways |= {f"chunk {c}": ov.accumulate.Chunked(accumulator, chunk=c) for c in chunks}
    ways["stochastic"] = ov.accumulate.Sequential(accumulator, rounding="stochastic")
    ways |= {f"{f} accumulator": ov.accumulate.Sequential(f) for f in formats if f != accumulator}

    values, lines, spreads = {}, {way: [] for way in ways}, []
    for length in track(list(lengths), "lengths"):
        for way, accumulate in ways.items():
            rows = x[: stochastic_trials if way == "stochastic" else trials, :length].contiguous()
            ratio = total(rows, accumulate, generator).double() / rows.double().sum(1)
            lines[way].append((float(ratio.mean()), float(ratio.std())))
            values[f"length {length}: {way}"] = float(ratio.mean())
        mean, std = lines["stochastic"][-1]
        values |= {f"length {length}: stochastic, mean": mean, f"length {length}: stochastic, std in %": 100 * std}
        spreads.append((length, mean, 100 * std, 100 * std / math.sqrt(stochastic_trials)))
        if 64 in chunks:
            lost = values[f"length {length}: no chunk"] / values[f"length {length}: chunk 64"]
            values[f"length {length}: no chunk ÷ chunk 64"] = lost
    mean, std = zip(*lines["stochastic"], strict=True)
    band = [m - s for m, s in lines["stochastic"]], [m + s for m, s in lines["stochastic"]]
    plain = [way for way in ways if way != "stochastic"]
    return Result(
        values,
        tables=[
            Table(
                "ratio",
                f"Sum ÷ exact, mean of {trials} vectors; {accumulator} unless named",
                ("length", *ways),
                [(n, *(lines[way][i][0] for way in ways)) for i, n in enumerate(lengths)],
            ),
            Table(
                "stochastic",
                f"Stochastic rounding, {stochastic_trials} vectors",
                ("length", "mean of sum ÷ exact", "standard deviation, %", "standard error of the mean, %"),
                spreads,
            ),
        ],
        plots=[
            Plot(
                "ratio",
                f"Swamping in {accumulator}, and chunks against it",
                "length of the sum",
                "sum ÷ exact",
                [Series(way, lengths, [m for m, _ in lines[way]]) for way in plain],
                x_scale="log2",
            ),
            Plot(
                "stochastic",
                "Stochastic rounding is right on average",
                "length of the sum",
                "sum ÷ exact",
                [
                    Series("stochastic, ± one standard deviation", lengths, mean, *band),
                    Series("nearest-even", lengths, [m for m, _ in lines["no chunk"]], dashed=True),
                ],
                x_scale="log2",
            ),
        ],
    )
