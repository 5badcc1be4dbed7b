"""What each format can say: limits, gaps, precision; and rounding by example."""

import math

import torch

import octavo as ov
from octavo.analysis.experiment import Plot, Result, Series, Table

F = ov.formats
FORMATS = (F.FP16, F.BF16, F.E4M3FN, F.E5M2, F.E3M4, F.E2M5, F.INT8)
#: addend, addend, format: each is rounded to the format, and so is the sum
SUMS = ((1024.6, 0.0), (1024.0, 1.5), (1025.0, 0.4), (1025.0, 100.6), (2048.0, 1.0))
OCTAVES = tuple(range(-17, 17))


def add(a: float, b: float, fmt, rounding="nearest-even") -> float:
    """The sum as a machine of this format makes it: operands rounded to nearest, the exact sum rounded."""
    a, b = (ov.cast(torch.tensor(x, dtype=torch.float64), fmt) for x in (a, b))
    return float(ov.cast(a + b, fmt, rounding))


def gap(fmt, octave: int) -> float:
    """The distance between neighbours in [2^octave, 2^(octave + 1)); NaN where the format has no values."""
    low, high = 2.0**octave, 2.0 ** (octave + 1)
    if low < fmt.min_subnormal or low > fmt.max:
        return math.nan
    values = fmt.values()
    inside = values[(values >= low) & (values <= high)]
    return float(inside.diff().max()) if len(inside) > 1 else math.nan


def stalls_at(fmt, most=5000) -> float:
    """Where 1 + 1 + 1 + … stops growing."""
    total, one = torch.zeros((), dtype=torch.float64), 1.0
    for _ in range(most):
        after = ov.cast(total + one, fmt)
        if after == total:
            break
        total = after
    return float(total)


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    formats=FORMATS,
    sums=SUMS,
    example=F.FP16,
    octaves=OCTAVES,
    draws=200_000,
) -> Result:
    """Limits and gaps of ``formats``; ``sums`` in the format ``example``."""
    formats, example = [F.get(fmt) for fmt in formats], F.get(example)
    values, limits, gaps = {}, [], {}
    for fmt in track(list(formats), "formats"):
        count = len(fmt.values())
        decimals = math.log10(2 / fmt.epsilon) if fmt.exponent else math.nan
        limits.append((str(fmt), fmt.max, fmt.min_normal, fmt.min_subnormal, fmt.epsilon, count, decimals))
        values |= {
            f"{fmt} max": fmt.max,
            f"{fmt} min normal": fmt.min_normal,
            f"{fmt} min subnormal": fmt.min_subnormal,
            f"{fmt} finite values": count,
            f"{fmt}: 1 + 1 + … stops at": stalls_at(fmt),
        }
        gaps[str(fmt)] = [gap(fmt, octave) for octave in octaves]

    by_example = []
    for a, b in sums:
        nearest = add(a, b, example)
        generator = torch.Generator().manual_seed(seed)
        exact = sum(ov.cast(torch.tensor([a, b], dtype=torch.float64), example))
        drawn = ov.cast(exact.expand(draws).contiguous(), example, "stochastic", generator=generator)
        up = float((drawn == drawn.max()).double().mean()) if drawn.max() > drawn.min() else 0.0
        values |= {f"{example} {a:g} + {b:g}": nearest, f"{example} {a:g} + {b:g}, stochastic up": up}
        values[f"{example} {a:g} + {b:g}, stochastic mean"] = float(drawn.mean())
        kinds = [add(a, b, example, rounding) for rounding in ("nearest-away", "toward-zero", "up")]
        by_example.append((f"{a:g} + {b:g}", float(exact), nearest, *kinds, up, float(drawn.mean())))

    low, high, tries = min(octaves), max(octaves) + 1, 256
    x = torch.logspace(low, high, (high - low) * tries, base=2, dtype=torch.float64)
    errors = [(fmt, ((ov.cast(x, fmt) - x) / x).abs()) for fmt in formats]
    shown = [octave for octave in octaves if octave % 4 == 0 or octave == 10]
    return Result(
        values,
        tables=[
            Table(
                "limits",
                "Limits",
                ("format", "max", "min normal", "min subnormal", "epsilon", "finite values", "decimal digits"),
                limits,
                6,
            ),
            Table(
                "gaps",
                "Distance between neighbours from 2^n to 2^(n + 1)",
                ("n", *map(str, formats)),
                [(n, *(gaps[str(fmt)][octaves.index(n)] for fmt in formats)) for n in shown],
            ),
            Table(
                "sums",
                f"Rounding by example, {example}",
                ("sum", "of rounded operands", "nearest-even", "nearest-away", "toward-zero", "up", "P(up)", "mean"),
                by_example,
                8,
            ),
        ],
        plots=[
            Plot(
                "gaps",
                "The distance between neighbours grows with the number",
                "number",
                "distance to the next number",
                [Series(str(fmt), [2.0**n for n in octaves], gaps[str(fmt)]) for fmt in formats],
                x_scale="log2",
                y_scale="log2",
            ),
            Plot(
                "lines",
                "All positive values",
                "value",
                "",
                [Series(str(fmt), fmt.values()[fmt.values() > 0].tolist()) for fmt in formats if fmt.bits <= 8],
                kind="strokes",
                x_scale="log2",
            ),
            Plot(
                "errors",
                "Relative rounding error: worst case within each octave",
                "number",
                "|rounded − number| / number",
                [
                    Series(str(fmt), x.view(-1, tries)[:, tries // 2].tolist(), error.view(-1, tries).amax(1).tolist())
                    for fmt, error in errors
                ],
                x_scale="log2",
                y_scale="log10",
            ),
        ],
    )
