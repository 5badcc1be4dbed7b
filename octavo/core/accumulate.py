"""How the products of a matrix multiplication are added up: the accumulator, in hardware or in thought.

K ascends, products are exact, and an accumulator says what becomes of the sum after every addition:

- ``FP32``                  what the machine does: FP32 sums in the order it likes best;
- ``Sequential(format)``    one float format, ``sum = round(sum + exact product)``: FP16, BF16, IBM's 1-6-9 …;
- ``Chunked(format, 64)``   the same in chunks, whose sums are then added up (IBM, 1812.08011);
- ``TensorCore()``          groups of products, aligned and cut off (Hopper, as DeepSeek-V3 measured it, 2412.19437);
- ``Integer(bits)``         two's complement that wraps or saturates.

Every addition is rounded once, from its exact value. What a format cannot hold: finite sums beyond its largest number
become ±∞ where it has infinities and stop at ±max where it has none (directed roundings stop at max as IEEE 754 has
it). Infinities and NaN *among the operands* propagate as in IEEE 754 in every format, also in those that have no code
for them: the float32 result carries them. An operand may be wider than the accumulator: its products are still exact,
and rounded when they are added. Sums of nothing, as with K = 0, are +0; so is every sum that is zero.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo import ops
from octavo.core import formats
from octavo.core.formats import FloatFormat
from octavo.errors import OctavoError
from octavo.ops import ROUNDINGS, Rounding, SumGrid

MOST_ALIGNED, MOST_BITS = 1 << 16, 32  # their sums stay below 2**53
LARGEST_INTEGER = 1 << 24  # up to here float32 holds every integer


@dataclass(frozen=True)
class Float32:
    """FP32 sums as the machine makes them; the constant ``FP32``. The order of additions is the kernel's own."""


@dataclass(frozen=True)
class Sequential:
    """One accumulator of a float format, rounded after every addition.

    ``format``: signed, with a zero and an integer bias; ``rounding``: any, stochastic too. The sum is one of unscaled
    numbers: operands scaled to E4M3FN's 448 overflow FP16, whose largest number is 65504, in a single product.
    """

    format: FloatFormat
    rounding: Rounding = "nearest-even"

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", _accumulator_format(self.format))
        _check_rounding(self.rounding)


@dataclass(frozen=True)
class Chunked:
    """Chunk-based accumulation of IBM (1812.08011): the error grows with K / chunk + chunk instead of K.

    ``chunk`` products at a time are summed from zero, rounded to ``format`` after every addition; the chunks' sums are
    added in order to an accumulator of the format ``outer`` (by default the same), rounded likewise. The last chunk may
    be shorter; where K is shorter there is only that.
    """

    format: FloatFormat
    chunk: int = 64
    rounding: Rounding = "nearest-even"
    outer: FloatFormat | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", _accumulator_format(self.format))
        if self.outer is not None:
            object.__setattr__(self, "outer", _accumulator_format(self.outer))
        _check_rounding(self.rounding)
        _check_count("chunk", self.chunk, 1)


@dataclass(frozen=True)
class TensorCore:
    """Hopper's FP8 sums as DeepSeek-V3 found them (2412.19437, section 3.5.2).

    ``align`` products and the sum so far are aligned to the largest exponent among them; each is cut off toward zero to
    ``bits`` bits counted from that exponent (to multiples of ``2**(largest exponent − bits + 1)``), they are added
    exactly, and that is the new sum. Every ``promote`` products it is added to an FP32 accumulator and starts again
    from zero; with ``None`` it never does, and the last sum is rounded to FP32. Groups are counted from each promotion.
    """

    align: int = 32
    bits: int = 14
    promote: int | None = 128

    def __post_init__(self) -> None:
        _check_count("align", self.align, 1, MOST_ALIGNED)
        _check_count("bits", self.bits, 1, MOST_BITS)
        if self.promote is not None:
            _check_count("promote", self.promote, 1)


@dataclass(frozen=True)
class Integer:
    """Two's complement of ``bits`` for integer operands; after every addition it wraps around or saturates.

    What wraps does not depend on the order of additions, what saturates does.
    """

    bits: int = 32
    overflow: Literal["wrap", "saturate"] = "wrap"

    def __post_init__(self) -> None:
        _check_count("bits", self.bits, 2, 32)
        if self.overflow not in ("wrap", "saturate"):
            raise OctavoError(f"an integer accumulator's overflow is 'wrap' or 'saturate', not {self.overflow!r}")


FP32 = Float32()

Accumulator = Float32 | Sequential | Chunked | TensorCore | Integer


def sum_products(a: Tensor, b: Tensor, how: Accumulator, generator: torch.Generator | None = None) -> Tensor:
    """``a @ b.T`` of float32 a [M, K] and b [N, K], their products added as ``how`` says; float32 [M, N].

    ``generator`` seeds stochastic rounding (torch's global one by default); the same seed gives the same bits on any
    number of threads. An ``Integer`` accumulator wants integers of at most 24 bits and raises ``OctavoError``
    otherwise; its sum is rounded to float32 if it has more than 24 bits.
    """
    if not a.dtype == b.dtype == torch.float32:
        raise OctavoError(f"sum_products takes float32 operands, not {a.dtype} and {b.dtype}; convert them first")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise OctavoError(f"sum_products takes [M, K] and [N, K], not {list(a.shape)} and {list(b.shape)}")
    length = max(a.shape[1], 1)  # what is longer than K is as long as K
    if isinstance(how, Sequential | Chunked):
        grid, rounding = _grid(how.format), how.rounding
        seed = _seed(generator) if rounding == "stochastic" else 0
        if isinstance(how, Sequential):
            return ops.accumulate_mm(a, b, grid, rounding, seed=seed)
        return ops.accumulate_mm(a, b, grid, rounding, min(how.chunk, length), _grid(how.outer or how.format), seed)
    if isinstance(how, TensorCore):
        return ops.accumulate_mm_aligned(a, b, how.align, how.bits, min(how.promote or length, length))
    if isinstance(how, Integer):
        for x in (a, b):
            if not bool(((x == x.trunc()) & (x.abs() <= LARGEST_INTEGER)).all()):
                raise OctavoError("an Integer accumulator adds products of integers of at most 24 bits; cast to INT8")
        return ops.accumulate_mm_integer(a, b, how.bits, how.overflow == "saturate").float()
    if isinstance(how, Float32):
        return ops.float_mm(a, b)
    raise OctavoError(
        f"accumulate is FP32, Sequential, Chunked, TensorCore or Integer of octavo.accumulate, not {how!r}"
    )


def _grid(fmt: FloatFormat) -> SumGrid:
    grid = fmt.grid
    return SumGrid(grid.mantissa, grid.emin, grid.high, not fmt.subnormals, fmt.has_infinity)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, device=device))


def _accumulator_format(name: "FloatFormat | str") -> FloatFormat:
    fmt = formats.get(name)
    if not isinstance(fmt, FloatFormat):
        raise OctavoError(f"{fmt.name} is an integer format; sums of integers take accumulate.Integer(bits)")
    if not (fmt.signed and fmt.zero):
        raise OctavoError(f"{fmt.name} cannot hold a sum: an accumulator needs a sign and a zero")
    if fmt.stretch != 1:
        raise OctavoError(f"{fmt.name} has the fractional bias {fmt.bias:g}; an accumulator needs an integer one")
    return fmt


def _check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise OctavoError(f"rounding is one of {', '.join(ROUNDINGS)}, not {rounding!r}")


def _check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise OctavoError(f"an accumulator's {name} is a whole number, {bounds}, not {value!r}")
