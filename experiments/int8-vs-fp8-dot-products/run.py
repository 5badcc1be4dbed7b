"""Dot products of 8-bit vectors: INT8 rounded, INT8 truncated, E4M3."""

from dataclasses import dataclass

import torch

import octavo as ov
from octavo.analysis.experiment import Plot, Result, Series, Table


@dataclass(frozen=True)
class Way:
    """A format, the number that each chunk's largest magnitude becomes, and how the rest is rounded."""

    format: object
    top: float
    rounding: str


WAYS = {
    "FP8": Way(ov.formats.E4M3FN, 224, "nearest-away"),
    "INT8 rounded": Way(ov.formats.INT8, 127, "nearest-away"),
    "INT8 truncated": Way(ov.formats.INT8, 127, "toward-zero"),
}
WHOLE = "no"


def quantize(x, way: Way, chunk: int | None):
    """Each row of ``x`` [trials, n], cut into chunks of one scale each (``None``: one a row)."""
    trials, n = x.shape
    parts = torch.nn.functional.pad(x, (0, -n % (chunk or n))).view(trials, -1, chunk or n)
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / way.top
    return (ov.cast(parts / scale, way.format, way.rounding) * scale).view(trials, -1)[:, :n]


def pairs(trials: int, n: int, correlation: float, generator):
    """Two standard normal vectors a row, correlated."""
    x, y = torch.randn(2, trials, n, generator=generator)
    return x, correlation * x + (1 - correlation**2) ** 0.5 * y


def dot(x, y):
    """Row by row, in float64."""
    return torch.linalg.vecdot(x.double(), y.double())


def decibels(ratio):
    """Of a ratio of powers."""
    return 10 * torch.log10(ratio)


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    ways=WAYS,
    correlations=(0.0, 0.01, 0.1, 0.2),
    chunks=(None, 512, 128),
    length=4096,
    lengths=(128, 1024, 4096),
    trials=4000,
    distribution_trials=200,
    draw=pairs,
    batch=500,
) -> Result:
    """Signal to noise for every correlation, way and chunk; distributions of the error for every length."""
    trials = min(trials, 250) if quick else trials
    generator = torch.Generator().manual_seed(seed)
    values, rows, curves = {}, [], {way: [] for way in ways}
    for rho in track(list(correlations), "correlations"):
        exact, errors = [], {(w, c): [] for w in ways for c in chunks}
        for start in range(0, trials, batch):
            x, y = draw(min(batch, trials - start), length, rho, generator)
            exact.append(dot(x, y))
            for (w, c), found in errors.items():
                found.append(dot(quantize(x, ways[w], c), quantize(y, ways[w], c)) - exact[-1])
        signal = torch.cat(exact)
        for (w, c), found in errors.items():
            noise = torch.cat(found)
            median = float(decibels(signal.square() / noise.square()).median())
            ratio = float(decibels(signal.square().sum() / noise.square().sum()))
            bias = float(noise.mean() / signal.abs().mean())
            name = f"ρ={rho:g}, chunk {c or WHOLE}: {w}"
            values |= {name: median, f"{name}, powers": ratio}
            rows.append((rho, str(c or WHOLE), w, median, ratio, 100 * bias))
            if c == chunks[0]:
                curves[w].append(median)
    if {"INT8 rounded", "INT8 truncated", "FP8"} <= set(ways) and None in chunks:
        name = f"ρ={correlations[-1]:g}, chunk {WHOLE}: "
        rounded, cut, fp8 = (values[name + w] for w in ("INT8 rounded", "INT8 truncated", "FP8"))
        values |= {"INT8 rounded over truncated": rounded - cut, "INT8 rounded over FP8": rounded - fp8}
        values["FP8 over INT8 truncated"] = fp8 - cut

    spread, plots = [], []
    for n in track(list(lengths), "lengths"):
        x, y = draw(distribution_trials, n, 0.0, generator)
        signal, series = dot(x, y), []
        for w, way in ways.items():
            found = (dot(quantize(x, way, None), quantize(y, way, None)) - signal).abs()
            quantiles = found.quantile(torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)).tolist()
            spread.append((n, w, *quantiles))
            values[f"length {n}: {w}, median error"] = quantiles[1]
            ordered = found.sort().values.tolist()
            series.append(Series(w, ordered, [(i + 1) / len(ordered) for i in range(len(ordered))]))
        title = f"Absolute error of a dot product of length {n}, {distribution_trials} trials"
        plots.append(Plot(f"errors-{n}", title, "|error|", "share of trials below", series, x_scale="log10"))
    return Result(
        values,
        tables=[
            Table(
                "snr",
                f"Signal to noise of a dot product of length {length}, {trials} trials",
                ("ρ", "chunk", "way", "median, dB", "ratio of summed powers, dB", "mean error, % of |dot|"),
                rows,
            ),
            Table("errors", "Absolute error", ("length", "way", "10 %", "median", "90 %", "largest"), spread),
        ],
        plots=[
            Plot(
                "snr",
                "Rounding is what makes INT8 work",
                "correlation of the two vectors",
                "median signal to noise, dB",
                [Series(w, correlations, curve) for w, curve in curves.items()],
            ),
            *plots,
        ],
    )
