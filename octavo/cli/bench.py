"""``octavo bench``: how fast 8-bit layers and models are here, beside floats and beside other libraries."""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli import calibrate, opening
from octavo.cli.console import Screen, table, tell
from octavo.cli.schemes import positive
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.analysis.bench.language import Prompt
    from octavo.analysis.bench.linear import Shape
    from octavo.analysis.bench.race import Race
    from octavo.analysis.bench.roofline import Roofline
    from octavo.analysis.bench.worker import Children
    from octavo.analysis.experiment import Table

HELP = (
    "how fast 8-bit layers and models are here, beside floats and other libraries",
    """\
Without MODEL: linear layers of some sizes in every scheme, their speed beside BF16, and how near
they come to what this machine can do (its roofline: memory and arithmetic, measured first). With
MODEL: reading a prompt (prefill) and continuing it (decode), tokens a second; a Python function's
model is run forward on its first batch.

All take turns, so that a busy machine is busy for all of them; compare ratios, not seconds. Other
libraries that are installed run beside (--peers), each in a process of its own with a copy of the
model, and so does everything compiled. Ctrl-C shows what was measured until then.""",
    """\
examples:
  octavo bench
  octavo bench --shapes 1x4096x4096,512x4096x4096 --schemes all
  octavo bench demo --html speed.html
  octavo bench demo --schemes int8-dynamic --compile --peers torchao,llama.cpp""",
)
SCHEMES = (
    "int8-dynamic",
    "int8-weight-only",
    "int8-group64",
    "int8-static",
    "fp8-dynamic",
    "fp8-weight-only",
    "fp8-block",
    "e3m4-int8-group64",
)
WEIGHTS, ROWS = ((576, 1536), (1536, 576), (2048, 2048)), (1, 16, 128, 512)  # [inner, columns]; rows
ALL, NONE, INSTALLED = "all", "none", "installed"
REPEATS, REPEATS_MODEL = 9, 5
PICTURES = {"plot": ".png", "html": ".html"}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help=opening.MODEL)
    parser.set_defaults(dtype="auto")
    parser.add_argument(
        "--schemes", type=_names, default=list(SCHEMES), metavar="A,B", help="which schemes, or 'all' (default: some)"
    )
    parser.add_argument(
        "--peers",
        type=_names,
        default=[INSTALLED],
        metavar="A,B",
        help="which other libraries: names, 'all', 'none' (default: those that are installed)",
    )
    parser.add_argument("--compile", action="store_true", help="everything under torch.compile as well: takes minutes")
    parser.add_argument(
        "--patience",
        type=positive,
        default=1200,
        metavar="SECONDS",
        help="how long another library or a compiler may take to get ready (default: 1200)",
    )
    parser.add_argument("--repeats", type=positive, metavar="N", help="turns (default: 9, or 5 with a model)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads of all (default: as torch has them)")
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where torch runs: cpu or cuda (default: cpu)"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw a picture as well")
    parser.add_argument("--html", metavar="FILE.html", help="write a page with all tables and pictures")
    layers = parser.add_argument_group("linear layers")
    layers.add_argument("--shapes", type=_names, metavar="MxKxN", help="rows x inner x columns, as 512x2048x2048,…")
    models = parser.add_argument_group("models")
    models.add_argument(
        "--prompt", type=positive, metavar="N", help="tokens to read (default: 512, or what it can take)"
    )
    models.add_argument("--new", type=positive, metavar="N", help="tokens to decode (default: 32)")
    models.add_argument("--head", action="store_true", help="quantize the output head too")
    models.add_argument(
        "--data", metavar="MODULE:FUNCTION", help="batches for a model that is no language model; the first is used"
    )


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Measure the machine, then the contenders in turns; show what there is, whole or interrupted."""
    from octavo.analysis.bench import linear
    from octavo.analysis.bench.race import Race
    from octavo.analysis.bench.worker import Children

    _check(arguments)
    schemes, peers = _schemes(arguments.schemes), _peers(arguments)
    with (
        _threads(arguments.threads) as threads,
        _quiet(),
        Children(threads, arguments.patience, partial(tell, "note")) as children,
    ):
        race = Race(linear.BASELINE)
        roofline: Roofline | None = None
        told: dict[str, Any] = {"model": arguments.model, "threads": threads, "device": arguments.device}
        try:
            measure = _model(arguments, screen, told) if arguments.model else _layers(arguments, screen)
            roofline = _roofline(screen, arguments.device)
            with screen.phase("measure"):
                measure(race, schemes, peers, children)
        except KeyboardInterrupt:
            if any(timing.seconds for timing in race.timings):
                _show(arguments, screen, race, roofline, {**told, "interrupted": True})
                screen.kept = "what was measured until then is shown"
            raise
    _show(arguments, screen, race, roofline, {**told, "interrupted": False})


def _layers(arguments: argparse.Namespace, screen: Screen) -> Any:
    """How linear layers are measured."""
    from octavo.analysis.bench import linear
    from octavo.analysis.bench import peers as others

    shapes = _shapes(arguments)

    def measure(race: "Race", schemes: list[str], peers: list[str], children: "Children") -> None:
        for some in linear.by_weight(shapes).values():
            made = linear.contenders(some, schemes, arguments.device, arguments.compile)
            made += others.linear(peers, some, children.threads, arguments.compile)
            inner, columns = some[0].inner, some[0].columns
            label = f"{inner} × {columns}"
            race.run(children.apart(made), linear.work(some), arguments.repeats or REPEATS, screen.track, label)

    return measure


def _model(arguments: argparse.Namespace, screen: Screen, told: dict[str, Any]) -> Any:
    """How a model is measured."""
    from octavo.analysis.bench import language
    from octavo.analysis.bench import peers as others

    with screen.phase("load", f"opening {arguments.model}"):
        opened = opening.float_model(arguments)
        task = _task(arguments, opened)
    told |= {"numbers": opened.numbers}
    if isinstance(task, language.Prompt):
        told |= {"prompt": task.length, "context": task.context, "new": task.new}

    def measure(race: "Race", schemes: list[str], peers: list[str], children: "Children") -> None:
        more = {"head": arguments.head, "device": arguments.device}
        made = language.contenders(opened.model, schemes, task, **more)
        with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
            if peers and not isinstance(task, language.Prompt):
                screen.say("Other libraries are measured on layers and language models only.", style="yellow")
                peers = []
            if arguments.compile or peers:
                stored = language.Stored.of(opened.model, Path(folder))
                made += language.compiled(stored, schemes, task, **more) if arguments.compile else []
                made += others.language(peers, stored, task, children.threads, arguments.compile) if peers else []
            repeats = arguments.repeats or REPEATS_MODEL
            race.run(children.apart(made), language.work(task), repeats, screen.track, arguments.model)

    return measure


def _task(arguments: argparse.Namespace, opened: opening.Opened) -> "Prompt | Any":
    """What the model is given: a prompt, or a batch of its own."""
    from octavo.analysis.bench import language
    from octavo.io import entry_point

    batches = entry_point.data(arguments.data) if arguments.data else opened.batches
    if batches is None and language.is_causal(opened.model):
        return language.prompt(opened.model, arguments.prompt, arguments.new)
    if given := [f for f in ("prompt", "new", "head") if getattr(arguments, f)]:
        raise OctavoError(f"--{given[0]} is for language models, and {arguments.model} is run on a batch")
    if batches is None:
        raise OctavoError(
            f"{arguments.model} ({type(opened.model).__name__}) is no causal language model; give it a batch: "
            "--data MODULE:FUNCTION, or a function that returns (model, batches)"
        )
    first = next(iter(batches), None)
    if first is None:
        raise OctavoError(f"{arguments.data or arguments.model} yields no batch")
    return first


def _roofline(screen: Screen, device: str) -> "Roofline":
    from octavo.analysis.bench import roofline

    with screen.phase("roofline", "measuring memory and arithmetic"):
        return roofline.measure(device=device)


def _show(
    arguments: argparse.Namespace, screen: Screen, race: "Race", roofline: "Roofline | None", told: dict[str, Any]
) -> None:
    """Tables, files, and the document."""
    from octavo.analysis import machine
    from octavo.report import speed

    here = machine.examine(rows=(), repeats=0)
    roofline = None if roofline is None else roofline.raised(race.timings)
    about = _about(here.processor, roofline, told)
    screen.facts(about)
    for one in speed.tables(race, roofline):
        screen.say()
        screen.say(_title(one.title, told), style="bold")
        screen.say(_table(one))
    missing = _not_installed() if INSTALLED in arguments.peers else []
    if missing:
        screen.say()
        screen.say(f"not installed, so not measured: {', '.join(missing)}; pip install 'octavo[peers]'", style="yellow")
    files = _draw(arguments, race, roofline, f"{'; '.join(about.values())}.")
    for file in files.values():
        screen.written = file
        screen.facts({"drawn into": file}, "bold green")
    screen.result(
        {
            **told,
            "processor": here.processor,
            "torch": here.torch,
            "kernels": here.native,
            "baseline": race.baseline,
            "roofline": None if roofline is None else roofline.to_json(),
            "timings": [
                {**row, "of_roof": None if roofline is None else roofline.share(timing)}
                for row, timing in zip(race.to_json(), race.timings, strict=True)
            ],
            "not_installed": missing,
            "files": files,
            "seconds": screen.seconds,
        }
    )


def _about(processor: str, roofline: "Roofline | None", told: dict[str, Any]) -> dict[str, str]:
    import torch

    found = {"machine": f"{processor}, {told['threads']} threads in use, torch {torch.__version__}"}
    if roofline is not None:
        found["roofline"] = str(roofline)
    if told["model"]:
        found["model"] = f"{told['model']}: {told.get('numbers', '')}"
    return found


def _title(task: str, told: dict[str, Any]) -> str:
    """A task in words."""
    if "prompt" not in told:
        return task.replace("x", " × ") if task[:1].isdigit() else task
    if task == "prefill":
        return f"prefill: {told['prompt']} tokens"
    return f"decode: {told['new']} tokens after {told['context']}"


def _table(one: "Table") -> Any:
    from octavo.report.files import number

    shown = table(*one.columns, right=[c for c in one.columns[1:] if c != "note"], fold=("note",))
    for row in one.rows:
        reason = "note" in one.columns and row[-1]
        shown.add_row(*(number(cell, one.digits) for cell in row), style="yellow" if reason else None)
    return shown


def _draw(arguments: argparse.Namespace, race: "Race", roofline: "Roofline | None", about: str) -> dict[str, str]:
    from octavo.report import files, html, plots, speed

    made: dict[str, str] = {}
    if not any(getattr(arguments, kind) for kind in PICTURES):
        return made
    found = speed.plots(race, roofline)
    for kind in PICTURES:
        name = getattr(arguments, kind)
        if name and kind == "plot" and not found:
            tell("note", f"nothing could be measured, so there is nothing to draw into {name}")
        elif name:
            page = kind == "html"
            about_all = ("Octavo: speed", about, found, speed.tables(race, roofline))
            file, overview = Path(name), 0 if arguments.model else -1  # a model's ratios, or the largest layer's roofs
            content = html.sheet(*about_all) if page else plots.png(found[overview])
            files.write(file.absolute().parent, {file.name: content})
            made[kind] = name
    return made


def _shapes(arguments: argparse.Namespace) -> "list[Shape]":
    from octavo.analysis.bench import linear

    if arguments.shapes is None:
        return [linear.Shape(rows, *weight) for weight in WEIGHTS for rows in ROWS]
    return [linear.shape(text) for text in arguments.shapes]


def _schemes(asked: list[str]) -> list[str]:
    """The names, each of a scheme."""
    from octavo.core import schemes

    names = list(schemes.NAMES) if asked == [ALL] else [] if asked == [NONE] else asked
    return list(dict.fromkeys(schemes.describe(schemes.get(name)) for name in names))


def _peers(arguments: argparse.Namespace) -> list[str]:
    from octavo.analysis.bench import peers

    asked = arguments.peers
    if arguments.device != "cpu":
        if asked not in ([INSTALLED], [NONE]):
            raise OctavoError("--peers run on the CPU only; leave out --device or --peers")
        return []
    if asked == [INSTALLED]:
        return [name for name in peers.FILES if peers.get(name).installed]
    names = list(peers.FILES) if asked == [ALL] else [] if asked == [NONE] else asked
    return list(dict.fromkeys(peers.get(name).name for name in names))


def _not_installed() -> list[str]:
    from octavo.analysis.bench import peers

    return [name for name in peers.FILES if not peers.get(name).installed]


def _names(text: str) -> list[str]:
    """Names with commas between."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names, with commas between them")
    return names


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything takes long."""
    if arguments.model is None:
        if given := [f for f in ("prompt", "new", "head", "data") if getattr(arguments, f)]:
            raise OctavoError(f"--{given[0]} is for a model; name one")
    elif arguments.shapes:
        raise OctavoError("--shapes are of single layers; leave it out, or MODEL")
    for kind, suffix in PICTURES.items():
        if file := getattr(arguments, kind):
            if Path(file).suffix.lower() != suffix:
                raise OctavoError(f"--{kind} {file}: the name must end in {suffix}")
            calibrate.check_file(file)
    if arguments.device != "cpu":
        _check_device(arguments.device)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise OctavoError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """So many threads for a while."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """What other libraries log while they run would stand between the bars."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
