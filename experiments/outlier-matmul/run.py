"""A matmul with a few outlier dimensions, quantized six ways."""

import torch

import octavo as ov
from octavo.analysis.experiment import Plot, Result, Series, Table

INT8 = ov.formats.INT8
#: SmoothQuant's O1: activations per token, weights per tensor. The columns of a weight may have a scale each as well.
SMOOTH = {
    "SmoothQuant O1": (ov.Cast(INT8, ov.PerToken()), ov.Cast(INT8)),
    "SmoothQuant, vector-wise": (ov.Cast(INT8, ov.PerToken()), ov.Cast(INT8, ov.PerChannel(1))),
}


def outliers(rows, inner, columns, dimensions, generator, low=30.0, high=60.0):
    """Standard normal activations with some dimensions between ``low`` and ``high``, and a normal weight.

    Each outlier dimension has one sign, every second is negative, so that a zero point cannot halve the range.
    """
    x = torch.randn(rows, inner, generator=generator)
    where = torch.randperm(inner, generator=generator)[:dimensions]
    sign = 1.0 - 2.0 * (torch.arange(dimensions) % 2)
    x[:, where] = torch.empty(rows, dimensions).uniform_(low, high, generator=generator) * sign
    return x, torch.randn(inner, columns, generator=generator) * inner**-0.5


def llm_int8(x, w, fmt=INT8, threshold=6.0):
    """LLM.int8(): the columns of x that hold an outlier in float, the rest vector-wise."""
    large = (x.abs() > threshold).any(0)
    rest = ov.matmul(x[:, ~large], w[~large], lhs=ov.Cast(fmt, ov.PerToken()), rhs=ov.Cast(fmt, ov.PerChannel(1)))
    return x[:, large] @ w[large] + rest


def smoothed(x, w, alpha, lhs, rhs):
    """SmoothQuant: the range of each dimension moved from x to w by max|x|^α / max|w|^(1−α)."""
    s = (x.abs().amax(0) ** alpha / w.abs().amax(1) ** (1 - alpha)).clamp(min=1e-5)
    return ov.matmul(x / s, w * s[:, None], lhs=lhs, rhs=rhs)


def ways(fmt=INT8, affine=ov.formats.UINT8):
    """The plain ones: how each operand is cast."""
    tensor = ov.Cast(fmt)
    return {
        "per tensor": (tensor, tensor),
        "zero point": (ov.Cast(affine, affine=True), tensor),
        "row-wise": (ov.Cast(fmt, ov.PerToken()), tensor),
        "vector-wise": (ov.Cast(fmt, ov.PerToken()), ov.Cast(fmt, ov.PerChannel(1))),
    }


PLAIN = ways()


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    shape=(512, 1024, 1024),
    dimensions=6,
    plain=PLAIN,
    alphas=(0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0),
    threshold=6.0,
    repeats=4,
    smooth=SMOOTH,
    data=outliers,
) -> Result:
    """The signal to noise of each way against the float64 product: mean and range over ``repeats`` seeds."""
    if quick:
        shape, repeats = tuple(map(min, shape, (128, 512, 256))), min(repeats, 2)
    found = {name: [] for name in (*plain, "LLM.int8()")}
    curves = {name: [] for name in smooth}
    for repeat in track(list(range(repeats)), "repeats"):
        x, w = data(*shape, dimensions, torch.Generator().manual_seed(seed + repeat))
        exact = (x.double() @ w.double()).float()
        for name, (lhs, rhs) in plain.items():
            found[name].append(ov.sqnr(exact, ov.matmul(x, w, lhs=lhs, rhs=rhs)))
        found["LLM.int8()"].append(ov.sqnr(exact, llm_int8(x, w, threshold=threshold)))
        for name, (lhs, rhs) in smooth.items():
            curves[name].append([ov.sqnr(exact, smoothed(x, w, alpha, lhs, rhs)) for alpha in alphas])
    values, bands = {}, {}
    for name, curve in curves.items():
        bands[name] = torch.tensor(curve)
        best = int(bands[name].mean(0).argmax())
        found[name] = bands[name][:, best].tolist()
        values[f"{name}: best α"] = alphas[best]
        values |= {f"{name} at α = {a:g}, dB": float(bands[name][:, i].mean()) for i, a in enumerate(alphas)}
    values |= {f"{name}, dB": sum(some) / len(some) for name, some in found.items()}
    order = (*plain, *list(smooth)[:1], "LLM.int8()")
    rises = [values[f"{b}, dB"] - values[f"{a}, dB"] for a, b in zip(order, order[1:], strict=False)]
    values["steps of the order that rise"] = sum(rise > 0 for rise in rises)
    shown = (*plain, *smooth, "LLM.int8()")
    return Result(
        values,
        tables=[
            Table(
                "ways",
                f"{' × '.join(map(str, shape))}, {dimensions} outlier dimensions; dB over {repeats} seeds",
                ("way", "mean", "least", "most"),
                [(name, values[f"{name}, dB"], min(found[name]), max(found[name])) for name in shown],
            ),
            Table(
                "alpha",
                "SmoothQuant over α, dB",
                ("α", *smooth),
                [(alpha, *(float(b[:, i].mean()) for b in bands.values())) for i, alpha in enumerate(alphas)],
            ),
        ],
        plots=[
            Plot(
                "ways",
                "Signal to noise of the product",
                "",
                "dB",
                [Series("", shown, [values[f"{n}, dB"] for n in shown])],
                kind="bars",
            ),
            Plot(
                "alpha",
                "SmoothQuant: how much of the range to move into the weight",
                "α (band: least and most over the seeds)",
                "signal to noise, dB",
                [
                    Series(name, alphas, b.mean(0).tolist(), b.amin(0).tolist(), b.amax(0).tolist())
                    for name, b in bands.items()
                ],
            ),
        ],
    )
