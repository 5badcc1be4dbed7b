"""What the command line says of comparing and choosing: on which data, for which engine, within which budget.

A text is in three parts that share no paragraph: one to judge by, and of the other half one to calibrate on and one to
search on, so that no figure that is reported comes from text that took part in the choice.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli import calibrate, measure
from octavo.cli.console import Screen
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.analysis.choice import Choice
    from octavo.analysis.comparison import Comparison
    from octavo.cli.opening import Opened

AUTO = "auto"
ENGINES = ("here", "vllm", "transformers", "onnx", "llama.cpp")
FAST = ("int8-dynamic", "fp8-dynamic", "int8-group64")
WINDOWS, WINDOW = 12, 256  # of text to search on; layers are compared on the first
FAST_WINDOW = 128
BUDGET = "0.5%"


@dataclass(frozen=True)
class Found:
    """A choice, and what ``quantize_`` takes as data for it, with that in words; None if it needs none."""

    choice: "Choice"
    data: list[Any] | None
    told: dict[str, Any] | None


@dataclass(frozen=True)
class Data:
    """Batches to search on, others to calibrate on (None: there are no others), and what they are in words."""

    search: list[Any]
    calibration: list[Any] | None
    source: str


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of ``octavo quantize`` without a scheme, or with ``--scheme auto``."""
    group = parser.add_argument_group("choosing a scheme for every layer (--scheme auto)")
    group.add_argument(
        "--budget",
        metavar="B",
        help="the largest increase of the loss, in nats or of the perplexity in percent, as 0.3%% "
        f"(default: {BUDGET.replace('%', '%%')})",
    )
    group.add_argument(
        "--objective", choices=("time", "size"), help="what is to be as little as can be (default: time)"
    )
    group.add_argument(
        "--for", dest="engine", choices=ENGINES, help="choose only among what this engine runs (default: here)"
    )
    group.add_argument("--hardware", metavar="NAME", help="and this hardware, as H100; see `octavo formats --support`")
    group.add_argument("--fast", action="store_true", help="try fewer schemes, on less text")
    page_flag(group)


def page_flag(group: Any) -> None:
    """Where the page goes."""
    group.add_argument("--html", metavar="FILE", help="write all of it as one page to look at")


def given(arguments: argparse.Namespace) -> list[str]:
    """Those flags that were given."""
    names = {"budget": "budget", "objective": "objective", "engine": "for", "hardware": "hardware", "fast": "fast"}
    return [f"--{flag}" for name, flag in (names | {"html": "html"}).items() if getattr(arguments, name, None)]


def budget(text: str | None) -> float:
    """The increase of the loss that ``0.3%`` or ``0.003`` allows."""
    import math

    words = (text or BUDGET).strip()
    try:
        number = float(words.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise OctavoError(f"--budget is a number or a percentage of 0 or more, as 0.3%, not {text!r}")
    return math.log1p(number / 100) if words.endswith("%") else number


def check(arguments: argparse.Namespace) -> None:
    """Refuse, before any model is opened, flags that do not go with the scheme, or that say nothing."""
    if arguments.scheme.lower() != AUTO:
        if flags := given(arguments):
            raise OctavoError(f"{flags[0]} is for --scheme auto, which chooses; here --scheme {arguments.scheme} does")
        return
    budget(arguments.budget)
    calibrate.check_file(arguments.html)


def data_for(arguments: argparse.Namespace, opened: "Opened", fast: bool = False) -> Data:
    """What the model is searched on. Raises ``OctavoError`` that says what to name if there is nothing."""
    from octavo.io import text as texts

    text, named, source = calibrate.example(arguments)
    if text is None or named is not None or opened.batches is not None:
        found = list(calibrate.batches(None, named, arguments, opened))
        if not found:
            raise OctavoError(f"{source} holds no batch to compare on; name other data: --data MODULE:FUNCTION")
        return Data(found[1::2] or found, found[::2] if len(found) > 1 else None, source)
    first, second = texts.split(text.content)
    calibration = list(calibrate.batches(measure.Text(first, text.source), None, arguments, opened))
    length = min(measure.length(arguments, opened.model), FAST_WINDOW if fast else WINDOW)
    tokens = texts.windows(opened.tokenizer, second, length, WINDOWS)
    keys = calibration[0].keys()
    return Data([dict.fromkeys(keys, row[None]) for row in tokens], calibration, text.source)


def run(arguments: argparse.Namespace, opened: "Opened", screen: Screen) -> Found:
    """Compare and choose as the flags say. Raises ``OctavoError`` for a budget that no mix keeps."""
    from octavo.analysis import engines
    from octavo.analysis.choose import choose
    from octavo.analysis.compare import quantizable
    from octavo.analysis.comparison import Candidate
    from octavo.analysis.variants import looks_at_data
    from octavo.core import schemes

    # what the layout cannot hold must not be chosen
    engine = arguments.engine or ("transformers" if arguments.layout == "compressed-tensors" else "here")
    runs = engines.get(engine).on(arguments.hardware)
    wanted: Sequence[Any] = engines.runnable(runs, quantizable(opened.model), runs.candidates)
    if arguments.fast:
        wanted = [c for c in wanted if c in [Candidate(schemes.get(name)) for name in FAST]] or wanted[:2]
    try:
        data = data_for(arguments, opened, arguments.fast)
    except OctavoError as error:
        raise OctavoError(f"{error}; or name a scheme for all layers, as --scheme int8-dynamic") from error
    with screen.phase("compare"):
        comparison = compared(arguments, opened, data, wanted, screen, whole=arguments.html is not None)
    with screen.phase("choose"):
        choice = choose(
            opened.model,
            data.search,
            budget(arguments.budget),
            "bytes" if arguments.objective == "size" else "time",
            engine,
            candidates=[*wanted, None],
            calibration=data.calibration,
            comparison=comparison,
            rounding=not arguments.fast,
            hardware=arguments.hardware,
            track=screen.track,
        )
    if arguments.html is not None:
        write_page(arguments.html, comparison, choice)
    if not choice.met:
        raise OctavoError(f"{choice.verdict} Allow more by --budget, or name a scheme for all layers by --scheme")
    if all(rule.scheme is None for rule in choice.rules):
        raise OctavoError(f"{choice.verdict} Name a scheme for all layers by --scheme, or use --objective size")
    say(screen, choice)
    if not any(map(looks_at_data, choice.rules)):
        return Found(choice, None, None)
    batches = data.search if data.calibration is None else data.calibration
    return Found(choice, batches, {"range": "what layers are given", "batches": len(batches), "source": data.source})


def compared(
    arguments: argparse.Namespace, opened: "Opened", data: Data, schemes: Sequence[Any], screen: Screen, whole: bool
) -> "Comparison":
    """The comparison of these schemes."""
    from octavo.analysis.compare import compare

    return compare(
        opened.model,
        data.search,
        schemes,
        calibration=data.calibration,
        cells_on=1,
        whole=whole,
        name=arguments.model,
        source=f"{len(data.search)} batches of {data.source}",
        track=screen.track,
    )


def write_page(file: str, comparison: "Comparison", choice: "Choice | None") -> None:
    """Write the page, whole or not at all."""
    from octavo.report.comparison import page

    write(file, page(comparison, choice, command=shlex.join(["octavo", *sys.argv[1:]])))


def write(file: str, content: bytes) -> None:
    """Write a file, whole or not at all."""
    path = Path(file)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def say(screen: Screen, choice: "Choice") -> None:
    """The verdict, and what the search tried."""
    screen.say(choice.verdict, style="bold" if choice.met else "bold red")
    for step in choice.steps:
        kept = "within" if step.within else "above"
        screen.facts({"tried": f"{step.what}: foretold {step.predicted:.4g}, measured {step.loss:+.4g}, {kept}"})
    screen.say()
