"""``octavo inspect MODEL --outliers``: the numbers that enter layers and are much larger than the others."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.cli import calibrate, opening
from octavo.cli.console import Screen, count, table
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.analysis.experiment import Table
    from octavo.analysis.outliers import Outliers

THRESHOLD = 6.0
ROWS = 12  # of each table on the screen; --json and --html have all


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("outliers")
    group.add_argument(
        "--outliers",
        action="store_true",
        help="look for outlier dimensions, massive activations and heavy tails in what enters the layers, on "
        "calibration data; --png and --html draw them",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help=f"the magnitude above which a number is an outlier (default: {THRESHOLD:g}, LLM.int8()'s)",
    )


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Open the model, pass data through it, show what was found."""
    from octavo.analysis.outliers import find_outliers

    _check(arguments)
    text, data, source = calibrate.example(arguments)
    with screen.phase("load", f"opening {arguments.model}"):
        opened = opening.any_model(arguments)
    batches = calibrate.batches(text, data, arguments, opened)
    threshold = THRESHOLD if arguments.threshold is None else arguments.threshold
    with screen.phase("look"):
        found = find_outliers(opened.model, batches, threshold=threshold, track=screen.track)
    files = _draw(arguments, found, screen)
    _show(screen, found, source)
    for file in files:
        screen.facts({"drawn into": file}, "bold green")
    told = {"model": arguments.model, "source": source, **found.to_json()}
    screen.result({**told, "positions": found.positions, "files": files, "seconds": screen.seconds})


def _show(screen: Screen, found: "Outliers", source: str) -> None:
    from octavo.report import outliers

    if screen.as_json:
        return
    systematic = ", ".join(str(d.index) for d in found.systematic)
    worst = max(found.of_layers, key=lambda x: x.token_crest)
    positions = [f"{position} ({total})" for position, total in list(found.positions.items())[:6]]
    screen.facts(
        {
            "looked at": f"{count(len(found.inputs), 'input')} of layers and norms, over {source}",
            "outliers": f"{count(len(found.dimensions), 'dimension')} of {found.width} exceed {found.threshold:g}; "
            + (f"in many layers and tokens (LLM.int8()): {systematic}" if systematic else "none in many layers"),
            "massive": f"{count(len(found.massive), 'activation')}"
            + (f", most at positions {', '.join(positions)}" if positions else ""),
            "worst tail": f"{outliers.described(worst)}: a token's largest is {worst.token_crest:.3g} × its rms",
        }
    )
    for one in outliers.tables(found):
        if one.rows:
            _say(screen, one)
    for note in found.notes:
        screen.say(note, style="yellow")


def _say(screen: Screen, one: "Table") -> None:
    screen.say()
    screen.say(one.title, style="bold")
    shown = table(*one.columns, right=one.columns[1:])
    rows = one.rows if one.name != "inputs" else sorted(one.rows, key=lambda row: -float(row[4]))
    for row in rows[:ROWS]:
        shown.add_row(*(f"{cell:.{one.digits}g}" if isinstance(cell, float) else str(cell) for cell in row))
    screen.say(shown)
    if len(rows) > ROWS:
        screen.say(f"and {len(rows) - ROWS} more: --json has them, and --html FILE", style="dim")


def _draw(arguments: argparse.Namespace, found: "Outliers", screen: Screen) -> list[str]:
    from octavo.report import files, html, outliers, plots

    written = []
    if arguments.png:
        file = Path(arguments.png)
        named = {file.with_stem(f"{file.stem}-{plot.name}"): plots.png(plot) for plot in outliers.plots(found)}
        files.write(file.absolute().parent, {path.name: content for path, content in named.items()})
        written += [str(path) for path in named]
    if arguments.html:
        page = html.sheet("Outliers", arguments.model, outliers.plots(found), outliers.tables(found))
        files.write(Path(arguments.html).absolute().parent, {Path(arguments.html).name: page})
        written.append(arguments.html)
    if written:
        screen.written = written[-1]
    return written


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, before the model is opened."""
    alone = {"--input": arguments.input, "--scheme": arguments.scheme, "--calibrate": arguments.calibrate}
    alone |= {"--layer": arguments.layer, "--tensors": arguments.tensors}
    if given := [flag for flag, value in alone.items() if value]:
        raise OctavoError(f"--outliers looks at what enters all layers; it does not go with {given[0]}")
    for kind, suffix in (("png", ".png"), ("html", ".html")):
        if file := getattr(arguments, kind):
            if Path(file).suffix.lower() != suffix:
                raise OctavoError(f"--{kind} {file}: the name must end in {suffix}")
            calibrate.check_file(file)
