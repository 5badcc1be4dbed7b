"""Numbers as a comparison's page says them: short, with the sign that counts, and in units that people know."""

import math
from dataclasses import dataclass

from octavo.analysis.comparison import Comparison


@dataclass(frozen=True)
class Units:
    """How a cost is said: of a language model as perplexity in percent, of any other as its loss, or as noise.

    ``whole``: what a loss's increase is called; ``unit``: its unit. ``part``: the same for one layer's cost alone.
    ``noise``: there is no loss, and a cost is a share of the outputs' power.
    """

    percent: bool
    whole: str
    part: str
    noise: bool = False

    @property
    def unit(self) -> str:
        """What stands behind an increase of the whole model."""
        return " %" if self.percent else ""

    def increase(self, loss: float | None) -> float | None:
        """An increase of the loss, as it is said."""
        if loss is None or not self.percent:
            return loss
        return 100 * math.expm1(loss) if loss < 700 else math.inf

    def said(self, loss: float | None, error: float | None = None) -> str:
        """An increase of the loss in words, with its standard error if there is one: ``+0.24 ± 0.07 %``."""
        say = signed if self.percent else two_digits
        told = say(self.increase(loss))
        told = told.lstrip("+") if self.noise else told
        if loss is None or not math.isfinite(loss):
            return told
        return told + (f" ± {say(self.increase(error)).lstrip('+')}" if error else "") + self.unit

    def one(self, cost: float | None) -> str:
        """One layer's cost."""
        return short(None if cost is None else 1000 * cost)


def units(comparison: Comparison) -> Units:
    """The units that suit a comparison."""
    percent = comparison.perplexity is not None
    noise = comparison.loss is None
    whole = "increase of perplexity" if percent else "noise in the outputs" if noise else "increase of the loss"
    if comparison.divergence is not None:
        part = f"{comparison.divergence}, in thousandths"
    else:
        part = "increase of the loss, in thousandths" + (" of a nat" if percent else "")
    return Units(percent, whole, part, noise)


def short(value: float | None) -> str:
    """Two or three significant digits: 0.012, 1.3, 140; what is nearly nothing is said to be so."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size, sign = abs(value), "−" if value < 0 else ""
    if size == 0:
        return "0"
    if size < 0.001:
        return f"{'>−' if value < 0 else '<'}0.001"
    if size >= 100_000:
        return f"{sign}{size:.0e}".replace("e+0", "e").replace("e+", "e")
    decimals = 3 if size < 0.01 else 2 if size < 1 else 1 if size < 100 else 0
    return f"{sign}{size:,.{decimals}f}"


def signed(value: float | None) -> str:
    """An increase: with its sign, to a hundredth where it is small."""
    if value is None or not math.isfinite(value):
        return short(value)
    if abs(value) >= 1000:
        return f"{'+' if value > 0 else '−'}{short(abs(value))}"
    text = f"{value:+.3f}" if abs(value) < 0.01 else f"{value:+.2f}" if abs(value) < 10 else f"{value:+.1f}"
    return "0" if not float(text) else text.replace("-", "−")


def two_digits(value: float | None) -> str:
    """An increase in units of any size: with its sign, and at least two digits that count."""
    if value is None or not math.isfinite(value) or value == 0:
        return short(value)
    return f"{'+' if value > 0 else '−'}{abs(value):.2g}" if abs(value) < 100 else signed(value)


def megabytes(size: float | None) -> str:
    """Bytes in MB of a million bytes."""
    return "–" if size is None else f"{size / 1e6:,.1f}" if size >= 1e6 else f"{size / 1e6:.3f}"


def decibels(value: float | None) -> str:
    """An SQNR."""
    if value is None:
        return "–"
    return f"{value:.0f} dB".replace("-", "−") if math.isfinite(value) else "exact" if value > 0 else short(value)


def milliseconds(value: float | None) -> str:
    """Seconds in milliseconds."""
    return "–" if value is None else f"{short(1000 * value)} ms"


def times(value: float | None) -> str:
    """A multiple."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def count(number: int, thing: str, several: str | None = None) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number:,} {thing if number == 1 else several or thing + 's'}"
