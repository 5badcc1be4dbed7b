"""Shared microexponents: MX9, MX6, MX4 against their bound, and against FP8 and INT8."""

import math
from dataclasses import dataclass

import torch

import octavo as ov
from octavo.analysis.experiment import Plot, Result, Series, Table


@dataclass(frozen=True)
class Microexponents:
    """A sign and ``mantissa`` bits each; ``block`` numbers share an exponent, ``pair`` of them a shift."""

    mantissa: int
    block: int = 16
    pair: int = 2
    shift_bits: int = 1

    @property
    def bits(self) -> float:
        """Bits a number, with its share of the 8-bit exponent and of the shift."""
        return 1 + self.mantissa + 8 / self.block + self.shift_bits / self.pair

    @property
    def bound(self) -> float:
        """The least signal to noise of any vector, dB (2302.08007, theorem 1)."""
        beta = 2**self.shift_bits - 1
        spread = 2.0 ** (2 * beta) / (self.block + (2.0 ** (2 * beta) - 1) * self.pair)
        return 20 * math.log10(2) * self.mantissa + 10 * math.log10(spread)

    def round(self, x):
        """Round [n, block]: shared exponent of the largest, pairs of smaller numbers get a finer step."""
        top = torch.frexp(x.abs().amax(-1, keepdim=True))[1]
        pairs = x.view(len(x), -1, self.pair)
        own = torch.frexp(pairs.abs().amax(-1, keepdim=True))[1]
        shift = (top.unsqueeze(-1) - own).clamp(0, 2**self.shift_bits - 1)
        step = torch.exp2((top.unsqueeze(-1) - shift - self.mantissa).to(x.dtype))
        most = 2**self.mantissa - 1
        integers = ov.cast(pairs / step, ov.formats.integer_format(self.mantissa + 2)).clamp(-most, most)
        return (integers * step).view_as(x)


FORMATS = {"MX9": Microexponents(7), "MX6": Microexponents(4), "MX4": Microexponents(2)}

OTHERS = {"E4M3FN": ov.formats.E4M3FN, "E5M2": ov.formats.E5M2, "INT8": ov.formats.INT8}


def worst(mx: Microexponents, blocks=1):
    """A block that comes as near to the bound as any: the largest number a power of two, the others half a step."""
    half = 2.0**-mx.mantissa
    x = torch.full((blocks, mx.block), half * 2.0 ** -(2**mx.shift_bits - 1), dtype=torch.float64)
    x[:, : mx.pair] = half
    x[:, 0] = 1.0 + half  # an even multiple of the step and a half: a tie
    return x


def samples(n, block, generator):
    """Vectors to try, [n, block] each, float64."""
    g = {"generator": generator, "dtype": torch.float64}
    normal = torch.randn(n, block, **g)
    return {
        "normal": normal,
        "uniform": torch.rand(n, block, **g) * 2 - 1,
        "normal of random σ": normal * torch.randn(n, 1, **g).abs(),
        "Laplace": torch.rand(n, block, **g).clamp(1e-12).log() * normal.sign(),
        "one outlier of 20 σ": torch.cat([torch.full((n, 1), 20.0, dtype=torch.float64), normal[:, 1:]], 1),
        "log-uniform, 12 octaves": torch.exp2(-12 * torch.rand(n, block, **g)),
        "sparse": normal * (torch.rand(n, block, **g) < 0.1),
    }


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    formats=FORMATS,
    data=samples,
    blocks=16_384,
    others=OTHERS,
    vector=1024,
) -> Result:
    """Signal to noise over all vectors, and of the worst block, against the bound."""
    blocks = 2048 if quick else blocks
    values, rows = {}, []
    for name, mx in formats.items():
        values |= {f"{name} bound": mx.bound, f"{name} bits": mx.bits}
    least = dict.fromkeys(formats, math.inf)
    table = {}
    for kind, x in track(list(data(blocks, 16, torch.Generator().manual_seed(seed)).items()), "distributions"):
        found = {}
        for name, mx in formats.items():
            cut = x.reshape(-1)[: x.numel() // mx.block * mx.block].view(-1, mx.block)
            y = mx.round(cut)
            power, noise = cut.square().sum(1), (cut - y).square().sum(1)
            some = noise > 0
            each = 10 * torch.log10(power[some] / noise[some])
            least[name] = min(least[name], float(each.min())) if len(each) else least[name]
            found[name] = ov.sqnr(cut, y)
        flat = x.reshape(-1)[: x.numel() // vector * vector].view(-1, vector)
        for name, fmt in others.items():
            found[name] = ov.sqnr(flat, ov.fake_quantize(flat, ov.Cast(fmt, ov.PerToken())))
        table[kind] = found
        values |= {f"{kind}: {name}": value for name, value in found.items()}
    for name, mx in formats.items():
        x = worst(mx)
        built = ov.sqnr(x, mx.round(x))
        values |= {f"{name} worst block met": least[name], f"{name} built worst": built}
        values[f"{name} above its bound, least"] = min(least[name], built) - mx.bound
        rows.append(
            (name, mx.bits, mx.bound, built, least[name], table["normal"][name] if "normal" in table else math.nan)
        )
    columns = (*formats, *others)
    return Result(
        values,
        tables=[
            Table(
                "bound",
                "The bound and what was met, dB",
                ("format", "bits a number", "bound", "worst block built", "worst block met", "normal, all"),
                rows,
            ),
            Table(
                "qsnr",
                f"Signal to noise, dB; the last {len(others)} with one scale for {vector} numbers",
                ("data", *columns),
                [(kind, *(found[c] for c in columns)) for kind, found in table.items()],
            ),
        ],
        plots=[
            Plot(
                "qsnr",
                "Signal to noise by data",
                "",
                "dB",
                [Series(c, list(table), [found[c] for found in table.values()]) for c in columns],
                kind="bars",
            ),
            Plot(
                "bound",
                "Signal to noise against the bound",
                "bits a number",
                "signal to noise, dB",
                [
                    Series(
                        "bound", [m.bits for m in formats.values()], [m.bound for m in formats.values()], dashed=True
                    ),
                    Series("worst block met", [m.bits for m in formats.values()], list(least.values())),
                    Series(
                        "normal data",
                        [m.bits for m in formats.values()],
                        [table.get("normal", found)[n] for n in formats],
                    ),
                ],
            ),
        ],
    )
