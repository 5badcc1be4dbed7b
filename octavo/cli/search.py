"""What the command line says of comparing and choosing: on which data, for which engine, within which budget.

A text is in three parts that share no paragraph: one to judge by, and of the other half one to calibrate on and one to
search on, so that no figure that is reported comes from text that took part in the choice.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli import calibrate, measure
from octavo.cli.console import Screen, count, tell
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.analysis.choice import Choice, Objective
    from octavo.analysis.comparison import Comparison
    from octavo.analysis.magnitudes import LayerMagnitudes
    from octavo.analysis.outliers import Outliers
    from octavo.cli.opening import Opened

AUTO = "auto"
ENGINES = ("here", "vllm", "transformers", "onnx", "llama.cpp")
FAST = ("int8-dynamic", "fp8-dynamic", "int8-group64")
WINDOWS, WINDOW = 12, 256  # of text to search on; layers are compared on the first
FAST_WINDOW = 128
NO_FILES = ("onnx", "llama.cpp")  # engines whose files Octavo does not write
LOOKED_AT = 2  # batches of which the page draws the numbers
BUDGET = "0.5%"


@dataclass(frozen=True)
class Numbers:
    """What the page draws of a float model's numbers: how large they are in each layer, and where outliers are."""

    magnitudes: "Sequence[LayerMagnitudes]" = ()
    outliers: "Outliers | None" = None


@dataclass(frozen=True)
class Found:
    """A choice, what it was made from, and what ``quantize_`` takes as data for it, in words too; None if nothing."""

    choice: "Choice"
    comparison: "Comparison"
    numbers: Numbers
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
        help="the largest increase of the loss, in nats or of the perplexity in percent, as 0.3%%; for "
        "models without a loss the share of the outputs' power that may be noise "
        f"(default: {BUDGET.replace('%', '%%')})",
    )
    group.add_argument(
        "--objective",
        choices=("time", "size"),
        help="what is to be as little as can be (default: time; where nothing is faster, size)",
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
        _try(opened.model, found[0], source)
        return Data(found[1::2] or found, found[::2] if len(found) > 1 else None, source)
    first, second = texts.split(text.content)
    calibration = list(calibrate.batches(measure.Text(first, text.source), None, arguments, opened))
    length = min(measure.length(arguments, opened.model), FAST_WINDOW if fast else WINDOW)
    tokens = texts.windows(opened.tokenizer, second, length, WINDOWS)
    keys = calibration[0].keys()
    return Data([dict.fromkeys(keys, row[None]) for row in tokens], calibration, text.source)


def _try(model: Any, batch: Any, source: str) -> None:
    """Let a batch of somebody's through the model. Raises ``OctavoError`` if it does not fit, whatever goes wrong."""
    import torch

    from octavo.calibration.batches import enter, evaluating

    try:
        with evaluating(model), torch.no_grad():
            enter(model, batch)
    except Exception as error:
        said = str(error) if isinstance(error, OctavoError) else f"{type(error).__name__}: {error}"
        raise OctavoError(
            f"the first batch of {source} does not go through the model: {said}. Mend the data"
        ) from error


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
    numbers = look(arguments, opened, data, screen)

    def chosen(objective: "Objective") -> "Choice":
        with screen.phase("choose"):
            return choose(
                opened.model,
                data.search,
                budget(arguments.budget),
                objective,
                engine,
                candidates=[*wanted, None],
                calibration=data.calibration,
                comparison=comparison,
                rounding=not arguments.fast,
                hardware=arguments.hardware,
                track=screen.track,
            )

    choice = chosen("bytes" if arguments.objective == "size" else "time")
    if arguments.objective is None and choice.met and choice.unchanged:
        runs_faster = "runs faster here" if engine == "here" else f"is said to run faster in {engine}"
        tell("note", f"nothing {runs_faster} than the model as it is, so this is the smallest that keeps the budget")
        choice = chosen("bytes")
    if not choice.met or choice.unchanged:
        write_page(arguments.html, comparison, choice, numbers)
        way = ", or use --objective size" if choice.met and arguments.objective == "time" else ""
        raise OctavoError(f"{choice.verdict} Allow more by --budget{way}, or name a scheme for all layers by --scheme")
    say(screen, choice)
    if engine in NO_FILES:
        tell("note", f"Octavo writes no file for {engine}: the folder is Octavo's, and says what {engine} could run")
    if not any(map(looks_at_data, choice.rules)):
        return Found(choice, comparison, numbers, None, None)
    batches = data.search if data.calibration is None else data.calibration
    told = {"range": "what layers are given", "batches": len(batches), "source": data.source}
    return Found(choice, comparison, numbers, batches, told)


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
        source=f"{count(len(data.search), 'batch', 'batches')} of {data.source}",
        track=screen.track,
    )


def look(arguments: argparse.Namespace, opened: "Opened", data: Data, screen: Screen) -> Numbers:
    """The numbers in the float model's layers, if a page is to show them."""
    from octavo.analysis.compare import quantizable
    from octavo.analysis.magnitudes import magnitudes
    from octavo.analysis.outliers import find_outliers

    if arguments.html is None:
        return Numbers()
    some = data.search[:LOOKED_AT]
    with screen.phase("look"):
        counted = magnitudes(opened.model, quantizable(opened.model), some, track=screen.track)
        seen = any(layer.inputs is not None for layer in counted)
        return Numbers(counted, find_outliers(opened.model, some, track=screen.track) if seen else None)


def write_page(
    file: str | None,
    comparison: "Comparison",
    choice: "Choice | None",
    numbers: Numbers,
    facts: "Mapping[str, str] | None" = None,
) -> None:
    """Write the page, if one is asked for, whole or not at all."""
    from octavo.report.comparison import page

    if file is not None:
        command = shlex.join(["octavo", *sys.argv[1:]])
        write(file, page(comparison, choice, numbers.magnitudes, numbers.outliers, command=command, facts=facts))


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
