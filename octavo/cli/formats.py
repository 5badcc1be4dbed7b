"""``octavo formats``: the catalogue of number formats, and one of them looked at closely."""

import argparse
import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.console import Screen, table
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.core.formats import Format

HELP = (
    "the number formats: limits, precision, and how they look",
    """\
Without a name: the catalogue. With a name, or with a format of your own described by its bits:
its limits, how many values lie between one power of two and the next, and its number line.""",
    """\
examples:
  octavo formats
  octavo formats e4m3fn e5m2
  octavo formats --exponent 3 --mantissa 4 --bias 5 --specials none
  octavo formats e4m3fn int8 --plot lines.png""",
)
SPECIALS = {
    "ieee": "infinities and NaNs, as in IEEE 754",
    "fn": "no infinity, one NaN a sign",
    "fnuz": "no infinity, one NaN, zero has no sign",
    "none": "numbers only",
}
BLOCKS = " ▁▂▃▄▅▆▇█"
ROWS = 4  # of text, in a drawing


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="formats to look at closely, as e4m3fn or int8")
    group = parser.add_argument_group("a format of your own")
    group.add_argument("--exponent", type=int, metavar="E", help="exponent bits")
    group.add_argument("--mantissa", type=int, metavar="M", help="mantissa bits")
    group.add_argument("--bias", type=float, metavar="B", help="exponent bias (default: 2**(E-1) - 1)")
    group.add_argument(
        "--specials",
        choices=tuple(SPECIALS),
        help="; ".join(f"{name}: {words}" for name, words in SPECIALS.items()) + " (default: ieee)",
    )
    group.add_argument("--no-subnormals", action="store_true", help="nothing but zero below the smallest normal number")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the number lines into a picture (png, svg or pdf)")


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """List the catalogue, or look at some formats closely."""
    from octavo.core import formats

    chosen = [formats.get(name) for name in arguments.names] + _described(arguments)
    catalogue = list(formats.CATALOGUE)
    if arguments.plot:
        _plot(chosen or list(formats.eight_bit()), Path(arguments.plot), screen)
    if chosen:
        for index, fmt in enumerate(chosen):
            if index:
                screen.say()
            _close_up(fmt, screen)
    else:
        _catalogue(catalogue, screen)
    screen.result({"formats": [_facts(fmt, bool(chosen)) for fmt in chosen or catalogue], "plot": arguments.plot})


def _described(arguments: argparse.Namespace) -> "list[Format]":
    from octavo.core import formats

    if arguments.exponent is not None and arguments.mantissa is not None:
        subnormals = not arguments.no_subnormals
        specials: Any = arguments.specials or "ieee"
        return [formats.float_format(arguments.exponent, arguments.mantissa, arguments.bias, specials, subnormals)]
    options = ("exponent", "mantissa", "bias", "specials", "no_subnormals")
    if given := [f"--{o.replace('_', '-')}" for o in options if getattr(arguments, o) not in (None, False)]:
        raise OctavoError(f"{given[0]} alone describes no format; give both --exponent and --mantissa")
    return []


def _catalogue(catalogue: "list[Format]", screen: Screen) -> None:
    if screen.as_json:
        return
    numbers = ("bias", "max", "normal", "least", "eps", "values")
    shown = table("name", "S-E-M", *numbers[:-1], "special", "values", right=numbers)
    for fmt in catalogue:
        shown.add_row(
            fmt.name, _bits(fmt), *(_limits(fmt)[key] for key in numbers[:-1]), fmt.specials, f"{_count(fmt):,}"
        )
    screen.say(shown)
    screen.say("\nnormal, least  the smallest positive number of full precision, and of any")
    screen.say("eps            from 1 to the next larger number")
    for name, words in SPECIALS.items():
        screen.say(f"{name:<15}{words}")
    screen.say("octavo formats NAME looks at one closely.")


def _close_up(fmt: "Format", screen: Screen) -> None:
    if screen.as_json:
        return
    limits = _limits(fmt)
    screen.say(fmt.name, style="bold")
    if fmt.exponent:
        sign = "sign 1, " if fmt.signed else ""
        screen.say(
            f"  bits      {fmt.bits}: {sign}exponent {fmt.exponent}, mantissa {_mantissa(fmt)}; bias {limits['bias']}"
        )
        flush = "" if fmt.subnormals or not fmt.zero else "; no subnormals"
        screen.say(f"  specials  {fmt.specials}: {SPECIALS[fmt.specials]}{flush}")
    else:
        screen.say(f"  bits      {fmt.bits}: integers from {fmt.min:g} to {fmt.max:g}")
    screen.say(f"  values    {_count(fmt):,} finite ones, from {fmt.min:.9g} to {fmt.max:.9g}")
    if fmt.exponent:
        normal, least = fmt.min_normal, fmt.min_subnormal
        screen.say(f"  smallest  {limits['normal']} = {normal:.9g} normal, {limits['least']} = {least:.9g} at all")
        screen.say(f"  epsilon   {limits['eps']} = {fmt.epsilon:g}, from 1 to the next larger number")
        decades = math.log10(fmt.max / fmt.min_subnormal)
        screen.say(f"  range     {decades:.1f} decades, {math.log2(fmt.max / fmt.min_subnormal):.1f} powers of two")
    screen.say("\n  values from one power of two to the next")
    for first, last, number in _binades(fmt):
        span = f"2^{first}" if first == last else f"2^{first} … 2^{last}, each"
        screen.say(f"    {span:<22}{number:>6,}")
    width = max(20, min(screen.width, 120) - 4)
    values = fmt.values()
    positive = values[values > 0].log2()
    screen.say("\n  how dense the positive values are, by power of two")
    low = math.floor(float(positive.min()))
    powers = max(1, math.ceil(float(positive.max())) - low)
    together = -(
        -powers // width
    )  # powers of two in a column, or else columns in a power of two, so that bars are even
    columns = width // powers * powers or -(-powers // together)
    high = low + (powers if together == 1 else columns * together)
    parts = next((n for n in (4, 3, 2, 5) if (high - low) % n == 0), 1)
    ticks = {float(x): f"2^{x}" for x in range(low, high + 1, (high - low) // parts)}
    _draw(positive.tolist(), low, high, columns, ticks, False, screen)
    screen.say("\n  how dense all values are; the height is logarithmic")
    places = sorted({x for x in (fmt.min, fmt.min / 2, 0.0, fmt.max / 2, fmt.max) if fmt.min <= x <= fmt.max})
    _draw(values.tolist(), fmt.min, fmt.max, width, {x: f"{x:.4g}" for x in places}, True, screen)


def _draw(
    values: list[float], low: float, high: float, width: int, ticks: dict[float, str], logarithmic: bool, screen: Screen
) -> None:
    """Bars of how many values, spread over the gaps between them, fall into each column; and an axis under them."""
    import numpy as np

    density = np.diff(np.interp(np.linspace(low, high, width + 1), values, np.arange(len(values))))
    some = density > 1e-9 * density.max()
    height = density / density.max()
    if logarithmic:  # twice as dense, one step higher
        steps = np.log2(np.where(some, density, 1.0))
        height = (steps - steps[some].min() + 1) / (steps[some].max() - steps[some].min() + 1)
    eighths = np.where(some, np.maximum(1, np.rint(height * ROWS * 8)), 0).astype(int)
    for row in reversed(range(ROWS)):
        screen.say("  " + "".join(BLOCKS[min(8, max(0, h - 8 * row))] for h in eighths), style="cyan")
    marks, labels = ["─"] * width, [" "] * width
    for x, label in ticks.items():
        place = round((x - low) / (high - low) * (width - 1))
        start = min(max(0, place - len(label) // 2), width - len(label))
        marks[place], labels[start : start + len(label)] = "┴", label
    screen.say(f"  {''.join(marks)}")
    screen.say(f"  {''.join(labels)}")


def _binades(fmt: "Format") -> list[tuple[int, int, int]]:
    """(e, f, n): n values lie in every [2^x, 2^(x + 1)) from x = e to f."""
    values = fmt.values()
    exponents = values[values > 0].log2().floor().int().tolist()
    spans: list[tuple[int, int, int]] = []
    for exponent, number in sorted(Counter(exponents).items()):
        if spans and spans[-1][1:] == (exponent - 1, number):
            spans[-1] = (spans[-1][0], exponent, number)
        else:
            spans.append((exponent, exponent, number))
    return spans


def _facts(fmt: "Format", close: bool) -> dict[str, Any]:
    """The format as JSON; with all its values, if it is looked at closely and they are few."""
    facts = {
        "name": fmt.name,
        "bits": fmt.bits,
        "signed": fmt.signed,
        "exponent": fmt.exponent,
        "mantissa": _mantissa(fmt),
        "bias": getattr(fmt, "bias", None),
        "specials": fmt.specials,
        "subnormals": fmt.subnormals,
        "max": fmt.max,
        "min": fmt.min,
        "min_normal": fmt.min_normal,
        "min_subnormal": fmt.min_subnormal,
        "epsilon": fmt.epsilon,
        "count": _count(fmt),
    }
    if close:
        facts["per_power_of_two"] = [{"first": a, "last": b, "values": n} for a, b, n in _binades(fmt)]
    if close and fmt.bits <= 8:
        facts["values"] = fmt.values().tolist()
    return facts


def _count(fmt: "Format") -> int:
    return int(fmt.values().numel())


def _mantissa(fmt: "Format") -> int:
    return int(getattr(fmt, "mantissa", fmt.bits - fmt.signed))


def _bits(fmt: "Format") -> str:
    return f"{int(fmt.signed)}-{fmt.exponent}-{_mantissa(fmt)}"


def _limits(fmt: "Format") -> dict[str, str]:
    """The limits as short strings: powers of two as such."""
    return {
        "bias": f"{fmt.bias:g}" if hasattr(fmt, "bias") else "",
        "max": f"{fmt.max:.4g}" if fmt.max >= 1e6 else f"{fmt.max:g}",
        "normal": power(fmt.min_normal),
        "least": power(fmt.min_subnormal),
        "eps": power(fmt.epsilon),
    }


def power(x: float) -> str:
    """``2^-6``, or the number itself if it is no power of two."""
    fraction, exponent = math.frexp(x)
    return f"2^{exponent - 1}" if fraction == 0.5 else f"{x:.4g}"


def _plot(chosen: "list[Format]", file: Path, screen: Screen) -> None:
    """Every format's values as strokes on a symmetric logarithmic and a linear line; the file appears whole."""
    from octavo.io import folder

    suffixes = (".png", ".svg", ".pdf")
    if file.suffix.lower() not in suffixes:
        raise OctavoError(f"--plot {file}: the name must end in {', '.join(suffixes)}")
    if not file.parent.is_dir():
        raise OctavoError(f"--plot {file}: there is no folder {file.parent}.{folder.did_you_mean(file.parent)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OctavoError("--plot needs matplotlib: pip install 'octavo[cli]'") from None
    figure = Figure(figsize=(10, 0.8 + 0.75 * len(chosen)), layout="constrained")
    lines, zoomed = figure.subplots(1, 2, sharey=True)
    for row, fmt in enumerate(chosen):
        values = fmt.values()
        positive = values[values > 0]
        lines.eventplot(positive.log2().tolist(), lineoffsets=-row, linelengths=0.7, linewidths=0.6)
        zoomed.eventplot((values / fmt.max).tolist(), lineoffsets=-row, linelengths=0.7, linewidths=0.6)
    lines.set_yticks([-row for row in range(len(chosen))], [fmt.name for fmt in chosen])
    lines.set_ylim(0.5 - len(chosen), 0.5)
    lines.set_xlabel("positive values, log2")
    zoomed.set_xlabel("values / max")
    aside = file.with_name(f".octavo-{os.getpid()}{file.suffix}")
    try:
        figure.savefig(aside, dpi=150)
        os.replace(aside, file)
    except OSError as error:
        raise OctavoError(f"--plot {file} cannot be written ({error.strerror}). Choose another name") from None
    finally:
        aside.unlink(missing_ok=True)
    screen.written = str(file)
    screen.say(f"drawn into {file}", style="green")
