"""``octavo compare``: what every scheme costs and saves, for the whole model and for every layer of it."""

import argparse
import json
from typing import TYPE_CHECKING

from octavo.cli import calibrate, measure, opening, search
from octavo.cli.console import Screen, mb, strict, table
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.analysis.comparison import Comparison, Outcome

MOST = 12  # layers in the table on the screen
HELP = (
    "what each scheme costs a model, layer by layer",
    """\
Quantizes one layer at a time under every scheme and measures how far the model's results move:
for language models the divergence of the next token's distribution on a text, for others the
noise in the outputs. Measures the bytes and the time of every layer here, and the whole model
under every scheme. Nothing is written but what --html and --save name.""",
    """\
examples:
  octavo compare demo --html demo.html
  octavo compare FOLDER --schemes int8-dynamic,fp8-dynamic,int8-group64
  octavo compare vision:resnet --data vision:pictures --json""",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help=opening.MODEL)
    measure.dtype_flag(parser)
    parser.add_argument(
        "--schemes", metavar="A,B", help="schemes by their names, with commas between (default: five usual ones)"
    )
    parser.add_argument("--no-whole", action="store_true", help="compare layers only, not whole models")
    parser.add_argument("--fast", action="store_true", help="on less text")
    calibrate.add_data(parser)
    group = parser.add_argument_group("what is written")
    search.page_flag(group)
    group.add_argument("--save", metavar="FILE", help="keep all figures as JSON")


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Open, compare, report."""
    from octavo.analysis.compare import SCHEMES
    from octavo.core import schemes

    names = SCHEMES if arguments.schemes is None else [name for name in arguments.schemes.split(",") if name.strip()]
    if not names:
        raise OctavoError("--schemes names none; give some, as int8-dynamic,fp8-dynamic, or leave it out")
    wanted = [schemes.get(name.strip()) for name in names]
    if arguments.calibrate is not None:
        raise OctavoError("--calibrate is for quantize: here static ranges hold all that was seen. Leave it out")
    for file in (arguments.html, arguments.save):
        calibrate.check_file(file)
    if arguments.html is not None and arguments.html == arguments.save:
        raise OctavoError(f"--html and --save both name {arguments.html}; the one would replace the other")
    with screen.phase("load", f"opening {arguments.model}"):
        opened = opening.float_model(arguments)
    data = search.data_for(arguments, opened, arguments.fast)
    with screen.phase("compare"):
        found = search.compared(arguments, opened, data, wanted, screen, whole=not arguments.no_whole)
    numbers = search.look(arguments, opened, data, screen)
    if arguments.save is not None:
        search.write(arguments.save, json.dumps(found.to_json(), indent=1, allow_nan=False).encode())
    if arguments.html is not None:
        with screen.phase("page", "drawing the page"):
            search.write_page(arguments.html, found, None, numbers)
    _say(screen, found)
    for file in (arguments.html, arguments.save):
        if file is not None:
            screen.facts({"written": file}, "bold green")
    screen.result(strict({"seconds": screen.seconds, "comparison": found.to_json()}))


def _say(screen: Screen, found: "Comparison") -> None:
    if found.outcomes:
        shown = table(
            "whole model", "MB", "loss", "divergence", "seconds", right=("MB", "loss", "divergence", "seconds")
        )
        for outcome in found.outcomes:
            shown.add_row(outcome.candidate, *_outcome(found, outcome))
        screen.say(shown)
        screen.say()
    names = [candidate.name for candidate in found.candidates if candidate.scheme is not None]
    by_layer = {layer.name: [found.cell(layer.name, name) for name in names] for layer in found.layers}
    worst = sorted(by_layer, key=lambda layer: -max((c.cost for c in by_layer[layer] if not c.excluded), default=0.0))
    shown = table("one layer alone", *names, right=names, fold=["one layer alone"])
    for layer in worst[:MOST]:
        shown.add_row(layer, *("—" if cell.excluded else f"{cell.cost:.2g}" for cell in by_layer[layer]))
    screen.say(shown)
    if len(worst) > MOST:
        screen.say(f"and {len(worst) - MOST} layers that cost less; --html, --json and --save have all")
    screen.facts({"figures": found.divergence or "increase of the loss", "over": found.data})
    for note in found.notes:
        screen.facts({"note": note}, "yellow")


def _outcome(found: "Comparison", outcome: "Outcome") -> list[str]:
    size = "" if outcome.bytes is None else mb(outcome.bytes)
    if outcome.excluded is not None:
        return [size, outcome.excluded, "", ""]
    loss = "" if outcome.loss is None else f"{outcome.loss:.4f}"
    if outcome.perplexity is not None and found.perplexity is not None:
        loss = f"{outcome.perplexity:.3f} ({100 * (outcome.perplexity / found.perplexity - 1):+.2f} %)"
    moved = "" if outcome.divergence is None else f"{outcome.divergence:.3g}"
    return [size, loss, moved, "" if outcome.seconds is None else f"{outcome.seconds:.3g}"]
