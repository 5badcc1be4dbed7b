"""FP8 products summed with few bits, truncated, as Hopper's tensor cores do; and promotion to FP32 against it."""

import torch

import octavo as ov
from octavo.analysis.experiment import Plot, Result, Series, Table

CAST = ov.Cast(ov.formats.E4M3FN)  # the largest number of each operand becomes 448


def uniform(rows, inner, generator):
    """U[0, 1): all of one sign, the worst case of truncation."""
    return torch.rand(rows, inner, generator=generator)


def normal(rows, inner, generator):
    """Standard normal, for comparison."""
    return torch.randn(rows, inner, generator=generator)


def errors(a, b, cast, accumulate):
    """Relative errors of every entry of a @ b.T against the exact product of the quantized operands, in %."""
    exact = ov.fake_quantize(a, cast).double() @ ov.fake_quantize(b, cast).double().T
    found = ov.matmul(a, b.T.contiguous(), lhs=cast, rhs=cast, accumulate=accumulate).double()
    return 100 * (found - exact).abs() / exact.abs().mean()


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    cast=CAST,
    data=uniform,
    other=normal,
    length=4096,
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16384),
    align=32,
    bits=14,
    bits_tried=(10, 11, 12, 13, 14, 15, 16, 18, 20),
    promote=128,
    promotions=(32, 64, 128, 256, 512, 1024, 2048),
    rows=32,
) -> Result:
    """The mean relative error against length, bits and the distance between promotions."""
    if quick:
        rows, length = min(rows, 8), min(length, 1024)
        lengths = [n for n in lengths if n <= 1024] or [min(lengths)]
        bits_tried, promotions = bits_tried[::2], promotions[::2]
    generator = torch.Generator().manual_seed(seed)
    longest = max(*lengths, length)
    a, b = data(rows, longest, generator), data(rows, longest, generator)
    c, d = other(rows, longest, generator), other(rows, longest, generator)

    def core(bits=bits, promote=None):
        return ov.accumulate.TensorCore(align=align, bits=bits, promote=promote)

    def error(n, accumulate, left=a, right=b):
        return float(errors(left[:, :n], right[:, :n], cast, accumulate).mean())

    ways = {"not promoted": core(), f"promoted every {promote}": core(promote=promote)}
    over = {way: [error(n, acc) for n in track(list(lengths), way)] for way, acc in ways.items()}
    centred = {way: [error(n, acc, c, d) for n in track(list(lengths), way)] for way, acc in ways.items()}
    by_bits = {way: [] for way in ways}
    for count in track(list(bits_tried), "bits"):
        for way, step in zip(ways, (None, promote), strict=True):
            by_bits[way].append(error(length, core(count, step)))
    by_distance = [error(length, core(promote=step)) for step in track(list(promotions), "promotions")]
    plain, promoted = error(length, core()), error(length, core(promote=promote))
    values = {
        f"{bits} bits, no promotion": plain,
        f"{bits} bits, promoted every {promote}": promoted,
        "promotion helps by": plain / promoted if promoted else float("inf"),
    }
    table = [(n, *(over[w][i] for w in ways), *(centred[w][i] for w in ways)) for i, n in enumerate(lengths)]
    return Result(
        values,
        tables=[
            Table(
                "length",
                "Mean error, % of the mean product",
                ("K", *(f"{data.__name__}, {w}" for w in ways), *(f"{other.__name__}, {w}" for w in ways)),
                table,
            ),
            Table(
                "bits",
                f"Bits kept, K = {length}; %",
                ("bits", *ways),
                list(zip(bits_tried, *by_bits.values(), strict=True)),
            ),
            Table(
                "promotions",
                f"Promotion to FP32, {bits} bits, K = {length}",
                ("every", "mean error, %"),
                list(zip(promotions, by_distance, strict=True)),
            ),
        ],
        plots=[
            Plot(
                "length",
                f"{bits} bits, truncated, {align} products at a time",
                "K, length of the dot product",
                "mean error, %",
                [Series(f"{data.__name__}, {w}", lengths, y) for w, y in over.items()]
                + [Series(f"{other.__name__}, {w}", lengths, y, dashed=True) for w, y in centred.items()],
                x_scale="log2",
                y_scale="log10",
            ),
            Plot(
                "bits",
                f"Each bit halves it: K = {length}",
                "bits kept",
                "mean error, %",
                [Series(way, bits_tried, [max(e, 1e-6) for e in errors]) for way, errors in by_bits.items()],
                y_scale="log10",
            ),
            Plot(
                "promotions",
                f"How often to promote: K = {length}, {bits} bits",
                "products between promotions",
                "mean error, %",
                [Series("", promotions, by_distance)],
                x_scale="log2",
                y_scale="log10",
            ),
        ],
    )
