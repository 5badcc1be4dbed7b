"""Bits of accuracy of the 8-bit formats at their best clip, by integration."""

import math

import octavo as ov
from octavo.analysis.distributions import best_clip, clip_errors, grid_of, normal, student_t, uniform
from octavo.analysis.experiment import Plot, Result, Series, Table

FORMATS = {
    "INT8": ov.formats.INT8,
    "E2M5": ov.formats.E2M5,
    "E3M4": ov.formats.QUALCOMM_E3M4,
    "E4M3": ov.formats.QUALCOMM_E4M3,
    "E5M2": ov.formats.QUALCOMM_E5M2,
}
NU, TRUNCATION = 3.0, 100.0
FIGURE = {  # figure 5
    "uniform": uniform(-1, 1),
    "normal": normal(),
    f"Student-t ν={NU:g}": student_t(NU),
    f"Student-t ν={NU:g}, |x| ≤ {TRUNCATION:g}": student_t(NU, -TRUNCATION, TRUNCATION),
}
SCRIPT = {  # the settings of the released compute_quant_error.py
    "U[−1,1]": uniform(-1, 1),
    "N(0,1)": normal(0, 1, -10, 10),
    "t ν=8": student_t(8, -100, 100),
}


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    formats=FORMATS,
    distributions=FIGURE,
    script=SCRIPT,
    levels=256,
    nus=(2.2, 2.5, 3, 4, 5, 8, 16, 64),
) -> Result:
    """Best clips of ``formats`` for every distribution, the Lloyd-Max bound, and tails of every weight ``nus``."""
    steps = 6 if quick else 24
    values, rows, curves = {}, [], []
    for name, density in track(list(distributions.items()), "figure 5"):
        found = {f: best_clip(density, grid_of(fmt), steps=steps) for f, fmt in formats.items()}
        bound = math.log2(density.std / math.sqrt(density.lloyd_max(levels, 40 if quick else 2000)[1]))
        values |= {f"{name}: {f}": best.bits for f, best in found.items()} | {f"{name}: Lloyd-Max": bound}
        rows.append((name, *(best.bits for best in found.values()), bound))
        curves.append((name, found))

    decibels = []
    for name, density in track(list(script.items()), "released script"):
        most = density.high if name.startswith("U") else math.inf  # see README: a clip beyond the support is better
        found = {f: best_clip(density, grid_of(fmt), steps=steps, most=most) for f, fmt in formats.items()}
        values |= {f"{name}: {f}, dB": best.mse_db for f, best in found.items()}
        decibels.append((name, *(best.mse_db for best in found.values())))

    tails = {f: [] for f in formats}
    for nu in track(list(nus[::3] if quick else nus), "tails"):
        for f, fmt in formats.items():
            tails[f].append(best_clip(student_t(nu), grid_of(fmt), steps=steps).bits)
    density = distributions.get("normal", next(iter(distributions.values())))
    clips = [density.std * 2 ** (k / 16) for k in range(0, 97, 4 if quick else 1)]
    return Result(
        values,
        tables=[
            Table("bits", "log2(σ / RMSE) at the best clip", ("distribution", *formats, "Lloyd-Max"), rows),
            Table(
                "clips",
                "The best clip, in σ",
                ("distribution", *formats),
                [(name, *(b.clip / b.sigma for b in found.values())) for name, found in curves],
            ),
            Table("script", "−10·log10(MSE), released settings, dB", ("distribution", *formats), decibels),
        ],
        plots=[
            Plot(
                "bits",
                "Bits of accuracy at the best clip",
                "",
                "log2(σ / RMSE), bits",
                [Series(f, [row[0] for row in rows], [row[i + 1] for row in rows]) for i, f in enumerate(formats)]
                + [Series("Lloyd-Max", [row[0] for row in rows], [row[-1] for row in rows])],
                kind="bars",
            ),
            Plot(
                "tails",
                "The heavier the tail, the more exponent bits",
                "Student-t ν (smaller: heavier)",
                "log2(σ / RMSE), bits",
                [Series(f, (nus[::3] if quick else nus), bits) for f, bits in tails.items()],
                x_scale="log2",
            ),
            Plot(
                "clip",
                f"Where to clip: {density.name}",
                "largest number of the grid / σ",
                "log2(σ / RMSE), bits",
                [
                    Series(
                        f,
                        [c / density.std for c in clips],
                        [math.log2(density.std / e) for e in clip_errors(density, grid_of(fmt), clips)],
                    )
                    for f, fmt in formats.items()
                ],
                x_scale="log2",
            ),
        ],
    )
