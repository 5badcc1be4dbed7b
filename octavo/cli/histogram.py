"""``octavo inspect MODEL --layer NAME``: the numbers of one layer, and the range that a scheme gives them."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli import calibrate, measure, opening
from octavo.cli.console import Screen, table
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from octavo.analysis.ranges import Spread
    from octavo.core.cast import Cast
    from octavo.core.schemes import Scheme

SCHEME = "int8-static"
ROWS = 24
PICTURES = {"png": ".png", "html": ".html"}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("the numbers of one layer")
    group.add_argument("--layer", metavar="NAME", help="draw the histogram of this layer's weights, and their range")
    group.add_argument("--input", action="store_true", help="of its inputs instead, on calibration data")
    group.add_argument(
        "--scheme", metavar="NAME", help=f"whose range is drawn (default: {SCHEME}, or an 8-bit layer's own)"
    )
    group.add_argument("--png", metavar="FILE", help="draw a picture as well")
    group.add_argument("--html", metavar="FILE", help="or a page")
    measure.dtype_flag(parser)
    opening.architecture_flag(parser)
    calibrate.add_data(parser)


def given(arguments: argparse.Namespace) -> list[str]:
    """The flags that mean nothing without a layer."""
    flags = ("input", "scheme", *PICTURES, "architecture", "calibrate", *calibrate.DATA)
    named = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(arguments, flag)]
    return named + (["--dtype"] if arguments.dtype != "auto" else [])


@dataclass(frozen=True)
class Look:
    """What was looked at: the layer, which of its numbers, how they are cast, over which range, what was found.

    Of ``stored`` weights only the codes are known, no more what they were rounded from.
    """

    layer: str
    what: str
    how: "Cast"
    words: str
    source: str
    spread: "Spread"
    stored: bool = False


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Open the model, look at the layer, draw."""
    from octavo.core import schemes

    _check(arguments)
    asked = schemes.get(arguments.scheme) if arguments.scheme else None
    if arguments.input:
        text, data, source = calibrate.example(arguments)
    with screen.phase("load", f"opening {arguments.model}"):
        opened = opening.any_model(arguments)
    module = find(opened.model, arguments.layer)
    if arguments.input:
        found = calibrate.batches(text, data, arguments, opened)
        twice = list(found) if isinstance(found, Iterator) else found
        scheme = asked or _own(module) or schemes.get(SCHEME)
        look = _inputs(arguments, opened.model, module, scheme, twice, source, screen)
    else:
        look = _weights(arguments, opened.model, module, asked)
    for kind in PICTURES:
        if file := getattr(arguments, kind):
            _draw(look, arguments.model, Path(file), kind)
            screen.written = file
    show(screen, look, {kind: getattr(arguments, kind) for kind in PICTURES if getattr(arguments, kind)})


def find(model: "nn.Module", name: str) -> "nn.Module":
    """The module of that name. Raises ``OctavoError`` with the nearest names."""
    import difflib

    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name and name in modules:
        return modules[name]
    own = [
        known for known, module in modules.items() if known and next(module.parameters(recurse=False), None) is not None
    ]
    near = difflib.get_close_matches(name, own, n=3, cutoff=0.4) or own[:3]
    raise OctavoError(
        f"{type(model).__name__} has no layer {name!r}; there are, for example, {', '.join(near) or 'none'}"
    )


def _weights(arguments: argparse.Namespace, model: "nn.Module", module: "nn.Module", asked: "Scheme | None") -> Look:
    """A float layer's weight in the range that an observer finds, or an 8-bit layer's in the range that it has."""
    from octavo.analysis.ranges import Tally
    from octavo.core import schemes
    from octavo.nn.layer import QuantizedLayer

    name = arguments.layer
    if isinstance(module, QuantizedLayer):
        if asked is not None or arguments.calibrate:
            raise OctavoError(f"{name} is 8-bit already and keeps its range; leave out --scheme and --calibrate")
        kept, how = module.quantized_weight, module.scheme.weight
        matrix, scale, zero_point, words = kept.dequantize(), kept.scale, kept.zero_point, "as kept"
    else:
        scheme = asked or schemes.get(SCHEME)
        matrix = _matrix(name, model, module)
        words = arguments.calibrate or calibrate.DEFAULT
        observer = calibrate.observer(words).fresh(scheme.weight.granularity)
        try:
            observer.update(matrix)
            how = observer.settle(scheme.weight)
            scale, zero_point = observer.scale(how, matrix.dtype)
        except OctavoError as error:
            raise OctavoError(f"the weight of {name}: {error}") from error
    low, high = (float(edge) for edge in matrix.aminmax())
    tally = Tally(low, high, how, scale, zero_point)
    tally.update(matrix)
    shape = " × ".join(map(str, matrix.shape))
    return Look(name, f"weights [{shape}]", how, words, "", tally.spread(), isinstance(module, QuantizedLayer))


def _inputs(
    arguments: argparse.Namespace,
    model: "nn.Module",
    module: "nn.Module",
    scheme: "Scheme",
    batches: Iterable[Any],
    source: str,
    screen: Screen,
) -> Look:
    """A layer's inputs: twice through the data, once for the range and once to count."""
    from octavo.analysis.ranges import Tally, watch_inputs
    from octavo.calibration.minmax import MinMax
    from octavo.core.cast import Cast
    from octavo.core.scaling import Static
    from octavo.core.schemes import describe
    from octavo.nn.layer import QuantizedLayer

    name, how = arguments.layer, scheme.input
    if how is None:
        raise OctavoError(f"{describe(scheme)} leaves inputs in float; name a --scheme that casts them, as {SCHEME}")
    kept: tuple[Tensor, Tensor | None] | None = None
    if isinstance(module, QuantizedLayer) and scheme == module.scheme and module.input_scale is not None:
        kept = module.input_scale, module.input_zero_point
    static = isinstance(how.scale, Static)
    if arguments.calibrate and (kept is not None or not static):
        why = (
            "keeps the range it has"
            if kept is not None
            else f"({describe(scheme)}) makes a scale of every input itself"
        )
        raise OctavoError(f"{name} {why}; --calibrate needs a static --scheme, as {SCHEME}")
    words = arguments.calibrate or calibrate.DEFAULT
    observer = calibrate.observer(words).fresh(how.granularity) if static and kept is None else None
    ends = MinMax()

    def see(x: "Tensor") -> None:
        ends.update(x)
        if observer is not None:
            observer.update(x)

    with screen.phase("calibrate"):
        watch_inputs(model, name, batches, see, screen.track, "calibrating")
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    if observer is not None:
        how = observer.settle(how)
        scale, zero_point = observer.scale(how)
    elif kept is not None:
        scale, zero_point, words = kept[0], kept[1], "as kept"
    else:
        words = "from every input itself"
    low, high = (float(edge) for edge in ends.range(Cast(how.format)))
    tally = Tally(low, high, how, scale, zero_point)
    with screen.phase("count"):
        watch_inputs(model, name, batches, tally.update, screen.track, "counting")
    return Look(name, "inputs", how, words, source, tally.spread())


def show(screen: Screen, look: Look, files: dict[str, str]) -> None:
    """The bars, and what they mean."""
    spread = look.spread
    screen.say(f"{look.layer}: {look.what}", style="bold")
    screen.facts(facts(look))
    screen.say()
    _bars(screen, spread)
    for file in files.values():
        screen.facts({"drawn into": file}, "bold green")
    screen.result(
        {
            "layer": look.layer,
            "what": look.what,
            "format": look.how.format.name,
            "granularity": str(look.how.granularity),
            "range": look.words,
            "source": look.source or None,
            **asdict(spread),
            "stored": look.stored,
            "count": spread.count,
            "edges": spread.edges,
            "clipped_share": spread.clipped_share,
            "files": files,
        }
    )


def facts(look: Look) -> dict[str, str]:
    """What was found, a few words to each."""
    spread, how = look.spread, look.how
    several = f"{spread.ranges:,} ranges, the widest" if spread.ranges > 1 else "one range,"
    if spread.ranges == 0:
        several = "a range for every input, the widest"
    narrow = f", the narrowest {_ends(spread.narrowest)}" if spread.ranges != 1 else ""
    share = spread.clipped_share
    clipped = f"{_percent(share)} ({sum(spread.clipped):,})" if share else "none"
    lost = f"{_percent(spread.zeroed / spread.count)} become 0 that were not"
    return {
        "numbers": f"{spread.count:,}, from {spread.low:.4g} to {spread.high:.4g}"
        + (f", over {look.source}" if look.source else ""),
        "range": f"{look.words}: {several} {_ends(spread.widest)}{narrow}",
        "format": f"{how.format.name}, {how.granularity}{', with a zero point' if how.affine else ''}",
    } | (
        {}
        if look.stored
        else {
            "clipped": f"{clipped}; {lost if spread.zeroed else 'none becomes 0 that was not'}",
            "SQNR": f"{spread.sqnr:.1f} dB",
        }
    )


def _bars(screen: Screen, spread: "Spread") -> None:
    """A row for some bins: where they begin and end, a bar as long as the logarithm of their count, the count."""
    import math

    if screen.as_json:
        return
    together = len(spread.counts) // ROWS
    edges = spread.edges[::together]
    rows = [
        (sum(spread.counts[i : i + together]), sum(spread.clipped[i : i + together]))
        for i in range(0, len(spread.counts), together)
    ]
    powers = [math.log2(total) for total, _ in rows if total]
    least, most = min(powers) - 1, max(powers)
    room = max(10, min(screen.width, 120) - 46)
    shown = table("from", "to", "", "numbers", "clipped", right=("from", "to", "numbers", "clipped"))
    for (total, clipped), low, high in zip(rows, edges, edges[1:], strict=False):
        eighths = round(8 * room * (math.log2(total) - least) / (most - least)) if total else 0
        bar = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
        style = "red" if clipped else None
        shown.add_row(f"{low:.4g}", f"{high:.4g}", bar, f"{total:,}", f"{clipped:,}" if clipped else "", style=style)
    screen.say(shown)
    screen.say("bars are logarithmic: twice the numbers, one step longer", style="dim")


def _draw(look: Look, model: str, file: Path, kind: str) -> None:
    from octavo.analysis.experiment import Plot, Series, Table
    from octavo.report import files, html, plots

    spread = look.spread
    middles = [(a + b) / 2 for a, b in zip(spread.edges, spread.edges[1:], strict=False)]
    series = [Series("numbers", tuple(middles), tuple(map(float, spread.counts)))]
    if any(spread.clipped):
        series.append(Series("clipped", tuple(middles), tuple(map(float, spread.clipped))))
    marks = [(edge, "range") for edge in spread.widest]
    if spread.ranges != 1:
        marks += [(edge, "narrowest") for edge in spread.narrowest]
    title = f"{look.layer}: {look.what}, {look.how.format.name}, {look.words}"
    plot = Plot(
        "histogram", title, "value", "numbers in a bin", tuple(series), "steps", "linear", "log10", tuple(marks)
    )
    if kind == "png":
        content = plots.png(plot)
    else:
        rows = tuple((name, words) for name, words in facts(look).items())
        content = html.sheet(f"{look.layer}: {look.what}", model, (plot,), (Table("facts", "", ("what", "is"), rows),))
    files.write(file.absolute().parent, {file.name: content})


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, before the model is opened."""
    if not arguments.input and (given := [f for f in calibrate.DATA if getattr(arguments, f)]):
        raise OctavoError(f"--{given[0].replace('_', '-')} is for inputs; add --input, or leave it out")
    if arguments.tensors:
        raise OctavoError("--tensors lists all of a checkpoint, --layer looks at one layer. Leave one out")
    for kind, suffix in PICTURES.items():
        if file := getattr(arguments, kind):
            if Path(file).suffix.lower() != suffix:
                raise OctavoError(f"--{kind} {file}: the name must end in {suffix}")
            calibrate.check_file(file)


def _matrix(name: str, model: "nn.Module", module: "nn.Module") -> "Tensor":
    """The weight as what shares a range sees it: a row an output channel."""
    from torch import Tensor

    from octavo.nn import swap

    layer = next((layer for layer in swap.layers(model) if name in layer.names), None)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.numel() or layer is None:
        raise OctavoError(f"{name} ({type(module).__name__}) has no weight; --input looks at what enters it")
    if layer.obstacle is None:
        return layer.matrix.detach()
    return weight.detach().reshape(len(weight) if weight.ndim > 1 else 1, -1)


def _own(module: "nn.Module") -> "Scheme | None":
    from octavo.nn.layer import QuantizedLayer

    return module.scheme if isinstance(module, QuantizedLayer) and module.scheme.input is not None else None


def _ends(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"±{high:.4g}" if low == -high else f"{low:.4g} … {high:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
