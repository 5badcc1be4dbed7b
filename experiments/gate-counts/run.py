"""Gates of a multiply-accumulate unit, counted from adders, multipliers, shifters and registers."""

import math
from dataclasses import dataclass

from octavo.analysis.experiment import Plot, Result, Series, Table


@dataclass(frozen=True)
class Gates:
    """Two-input gates a cell (2303.17951, appendix B)."""

    simple: int = 1  # AND, OR
    mux: int = 3
    xor: int = 3
    half_adder: int = 3
    full_adder: int = 7
    flip_flop: int = 6

    def add(self, bits: int) -> int:
        """Ripple-carry: a half adder and full adders."""
        return self.full_adder * (bits - 1) + self.half_adder if bits else 0

    def multiply(self, bits: int) -> int:
        """Array multiplier: partial products, and rows of adders."""
        return self.simple * bits**2 + self.full_adder * (bits - 1) ** 2 + self.half_adder * (bits - 1)

    def widen(self, bits: int, places: int) -> int:
        """A shifter that spreads ``bits`` over ``places`` more."""
        return (bits - 2) * math.ceil(math.log2(places + 1)) * self.mux + 4 * places if places else 0

    def shift(self, bits: int) -> int:
        """A barrel shifter of as many bits as it is wide."""
        return bits * math.ceil(math.log2(bits)) * self.mux


@dataclass(frozen=True)
class Operand:
    """Exponent bits, and bits of the significand with its leading one (all 8 of an integer)."""

    exponent: int
    significand: int

    @property
    def product(self) -> int:
        """Bits of a product's significand."""
        return 2 * self.significand - 1


def eight_bits(exponent: int) -> Operand:
    """The 8-bit format of so many exponent bits; 0 is INT8."""
    return Operand(exponent, 9 - exponent if exponent else 8)


OPERANDS = {
    "INT8": eight_bits(0),
    "E2M5": eight_bits(2),
    "E3M4": eight_bits(3),
    "E4M3": eight_bits(4),
    "E5M2": eight_bits(5),
}
ACCUMULATORS = {"fixed": None, "FP16": Operand(5, 11), "FP32": Operand(8, 24)}


def multiplier(x: Operand, g: Gates) -> int:
    """Significands multiplied, exponents added."""
    return g.multiply(x.significand) + g.add(x.exponent)


def fixed(x: Operand, g: Gates, headroom: int) -> int:
    """A fixed-point accumulator as wide as all products laid side by side, and ``headroom`` bits for the sum."""
    places = 2 * (2**x.exponent - 2) if x.exponent else 0
    width = x.product + places
    register = g.flip_flop * (x.product + x.exponent + 1) if x.exponent else 0
    align = g.widen(x.product, places) + g.add(width) + register
    return align + g.half_adder * headroom + g.flip_flop * (width + headroom)


def floating(x: Operand, accumulator: Operand, g: Gates, guard: int) -> int:
    """A single-path floating-point adder, our reading (the paper's is not spelled out): see README."""
    e, s, wide = accumulator.exponent, accumulator.significand, accumulator.significand + guard
    parts = {
        "product register": g.flip_flop * (x.product + x.exponent + 1),
        "compare exponents": g.add(e) + g.mux * e,
        "swap": 2 * g.mux * s,
        "align": g.shift(wide),
        "add or subtract": g.xor * wide + g.add(wide),
        "negate": (g.xor + g.half_adder) * wide,
        "leading zeros": g.simple * wide,
        "normalise": g.shift(wide) + g.add(e),
        "round": g.half_adder * (s + e),
        "register": g.flip_flop * (s + e),
    }
    return sum(parts.values())


def run(
    quick=False,
    seed=0,
    track=lambda items, label: items,
    operands=OPERANDS,
    accumulators=ACCUMULATORS,
    gates=Gates(),
    headroom=12,
    guard=3,
) -> Result:
    """Count the gates of every operand format with every accumulator."""
    values, rows = {}, []
    for name, x in track(list(operands.items()), "formats"):
        row = []
        for where, accumulator in accumulators.items():
            sums = fixed(x, gates, headroom) if accumulator is None else floating(x, accumulator, gates, guard)
            values[f"{name} → {where}"] = multiplier(x, gates) + sums
            row.append(values[f"{name} → {where}"])
        rows.append((name, multiplier(x, gates), *row))
    base = values.get("INT8 → fixed", math.nan)
    relative = [(name, *(100 * (values[f"{name} → {a}"] / base - 1) for a in accumulators)) for name in operands]
    for what in ("FP16", "FP32"):
        if f"E4M3 → {what}" in values:
            values[f"E4M3 → {what} over INT8 → fixed"] = values[f"E4M3 → {what}"] / base
    return Result(
        values,
        tables=[
            Table("gates", "Two-input gates", ("format", "multiplier", *accumulators), rows),
            Table("relative", "More gates than INT8 → fixed, %", ("format", *accumulators), relative, 3),
        ],
        plots=[
            Plot(
                "gates",
                "Gates of one multiply-accumulate unit",
                "",
                "two-input gates",
                [
                    Series(f"{a} accumulator", list(operands), [values[f"{n} → {a}"] for n in operands])
                    for a in accumulators
                ],
                kind="bars",
            )
        ],
    )
