"""Signal to noise of a Gaussian bulk when one outlier sets the scale."""

import math

import octavo as ov
from octavo.analysis.distributions import grid_of, normal
from octavo.analysis.experiment import Plot, Result, Series, Table

FORMATS = {
    "INT8": ov.formats.INT8,
    "E2M5": ov.formats.E2M5,
    "E3M4": ov.formats.E3M4,
    "E4M3": ov.formats.E4M3FN,
    "E5M2": ov.formats.E5M2,
}


def sqnr(density, fmt, crest: float) -> float:
    """Of a density rounded to a grid whose largest number is ``crest`` standard deviations, in dB."""
    sigma = density.std
    return 10 * math.log10(sigma**2 / density.mse(grid_of(fmt) * crest * sigma))


def crossover(density, one, other, low=2.0, high=200.0) -> float:
    """The crest factor beyond which ``other`` is better than ``one``: the last sign change, by bisection."""
    crests = [low * (high / low) ** (i / 400) for i in range(401)]
    ahead = [sqnr(density, one, c) > sqnr(density, other, c) for c in crests]
    if True not in ahead or ahead[-1]:
        return math.nan
    last = len(ahead) - 1 - ahead[::-1].index(True)
    low, high = crests[last], crests[last + 1]
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if sqnr(density, one, middle) > sqnr(density, other, middle) else (low, middle)
    return low


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    formats=FORMATS,
    bulk=None,
    integer="INT8",
    flat=("E4M3", "E3M4"),
    flat_between=(6.0, 24.0),
    crests=(2, 1000),
    points=240,
) -> Result:
    """The curve of every format from one crest factor to another, and where it overtakes ``integer``."""
    bulk = bulk or normal()
    points = 40 if quick else points
    x = [crests[0] * (crests[1] / crests[0]) ** (i / (points - 1)) for i in range(points)]
    curves = {name: [sqnr(bulk, fmt, c) for c in x] for name, fmt in track(list(formats.items()), "formats")}
    values, rows = {}, []
    for name in (name for name in flat if name in formats):
        some = [y for c, y in zip(x, curves[name], strict=True) if flat_between[0] <= c <= flat_between[1]]
        if some:
            values |= {f"{name} level": sum(some) / len(some), f"{name} ripple": max(some) - min(some)}
    for name, fmt in formats.items():
        if integer in formats and name != integer:
            values[f"{integer} = {name}"] = crossover(bulk, formats[integer], fmt)
            rows.append((name, values[f"{integer} = {name}"]))
    shown = (3, 4, 6, 8, 12, 16, 24, 48, 100, 300)
    marks = tuple((crest, f"{name} overtakes") for name, crest in rows if name in ("E3M4", "E4M3", "E5M2"))
    return Result(
        values,
        tables=[
            Table(
                "sqnr",
                f"Signal to noise of the bulk ({bulk.name}), dB",
                ("amax/σ", *formats),
                [(c, *(sqnr(bulk, fmt, c) for fmt in formats.values())) for c in shown],
            ),
            Table("crossovers", f"Where a float overtakes {integer}", ("format", "amax/σ"), rows),
        ],
        plots=[
            Plot(
                "sqnr",
                "An outlier costs an integer 6 dB each time it doubles; floats do not mind",
                "crest factor: largest magnitude / σ of the bulk",
                "signal to noise of the bulk, dB",
                [Series(name, x, curve) for name, curve in curves.items()],
                x_scale="log2",
                marks=marks,
            )
        ],
    )
