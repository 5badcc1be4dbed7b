"""What the command line says of calibration: which example data enters the model, and what range is made of it.

The observers' names and settings are repeated here in words, because help must not wait for torch.
"""

import argparse
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.cli import measure
from octavo.cli.console import Screen, count, tell
from octavo.cli.measure import Text
from octavo.cli.schemes import positive
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.calibration.observer import Observer
    from octavo.calibration.run import Calibration
    from octavo.cli.opening import Opened
    from octavo.ptq.rules import Rule

WINDOWS = 32


class Known(NamedTuple):
    """An observer by its name on the command line: its class, the setting that ``=VALUE`` gives, and what it does."""

    home: str
    kind: str
    setting: str | None
    default: str
    words: str


OBSERVERS = {
    "minmax": Known("minmax", "MinMax", None, "", "all of the range that was seen"),
    "moving-average": Known("moving_average", "MovingAverage", "momentum", "0.9", "the average range of the batches"),
    "percentile": Known("percentile", "Percentile", "percent", "99.99", "all but the largest numbers, so many percent"),
    "entropy": Known("entropy", "Entropy", None, "", "the range that keeps most information (TensorRT's)"),
    "mse": Known("mse", "MSE", None, "", "the range of least squared error"),
    "line-search": Known(
        *("line_search", "LineSearch", "mode", "fully-flexible"),
        "of floats the mantissa bits too (Qualcomm's); or =flexible-bias, =fixed",
    ),
}
OBSERVERS_HELP = "ranges, what calibration makes of the numbers seen:\n" + "\n".join(
    f"  {name + (f'={known.default}' if known.default else ''):<28}{known.words}" for name, known in OBSERVERS.items()
)
DEFAULT = "minmax"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags that say how static scales are found, for ``octavo quantize``."""
    group = add_data(parser)
    group.add_argument(
        "--calibrate-weights",
        metavar="RANGE",
        help="the same for the ranges of the weights, under any scheme (default: all of their range)",
    )
    group.add_argument(
        "--save-calibration",
        metavar="FILE",
        help="keep what was seen, also if the data ends in an error or by Ctrl-C; without --out, that is all",
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="take what was seen from files that --save-calibration wrote, several of them together",
    )
    group.add_argument(
        "--allow-uncalibrated",
        action="store_true",
        help="leave layers in float that no data reaches, instead of stopping",
    )


def add_data(parser: argparse.ArgumentParser) -> Any:
    """The flags that say what enters the model, and what range is made of it."""
    group = parser.add_argument_group("calibration, for schemes with static scales")
    group.add_argument(
        "--calibrate",
        metavar="RANGE",
        help=f"what range to make of the inputs seen, as percentile=99.99; see below (default: {DEFAULT})",
    )
    group.add_argument(
        "--calibration-text",
        metavar="FILE",
        help="UTF-8 text; the parts are used that --text would not judge by (default: --text's file, or Python's docs)",
    )
    group.add_argument("--calibration-windows", type=positive, metavar="N", help=f"pieces of it (default: {WINDOWS})")
    group.add_argument(
        "--data", metavar="MODULE:FUNCTION", help="other data: a Python function that returns batches, as a DataLoader"
    )
    return group


def observer(text: str) -> "Observer":
    """What ``NAME[=VALUE]`` says. Raises ``OctavoError`` for a name or a value that it does not know."""
    from importlib import import_module

    name, equals, value = text.strip().lower().replace("_", "-").partition("=")
    known = OBSERVERS.get(name)
    if known is None:
        near = difflib.get_close_matches(name, OBSERVERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OctavoError(f"no range is called {name!r}; {hint}There are: {', '.join(OBSERVERS)}")
    kind: type[Observer] = getattr(import_module(f"octavo.calibration.{known.home}"), known.kind)
    if not equals:
        return kind()
    if known.setting is None:
        raise OctavoError(f"{name} takes no value, so leave out ={value}")
    setting: Any = value
    if known.setting != "mode":
        try:
            setting = float(value)
        except ValueError:
            raise OctavoError(f"{name}={value}: {value!r} is not a number; as {name}={known.default}") from None
    return kind(**{known.setting: setting})


@dataclass(frozen=True)
class Plan:
    """How the flags want it done: one that was looked at, as far as can be, before any model is opened.

    ``observer`` is None where ``saved`` brings its own. ``by_data``: rules smooth or round by data, so that
    ``quantize_`` takes the batches themselves.
    """

    observer: "Observer | None"
    words: str
    text: Text | None
    data: Iterable[Any] | None
    source: str
    saved: "Calibration | None"
    keep: str | None
    by_data: bool = False


def plan(arguments: argparse.Namespace, rules: "list[Rule]") -> Plan | None:
    """How data will be looked at; None if no rule needs it. Raises ``OctavoError`` for flags that do not fit."""
    from octavo.core.schemes import Scheme

    _check(arguments)
    by_data = any(rule.smooth is not None or rule.rounding != "nearest" for rule in rules)
    if by_data and (given := _given(arguments, "save_calibration", "calibration")):
        raise OctavoError(f"{given[0]} keeps ranges, but these rules smooth or round by the data itself. Leave it out")
    static = any(isinstance(rule.scheme, Scheme) and rule.scheme.static for rule in rules)
    if not static and by_data:
        if given := _given(arguments, "calibrate"):
            raise OctavoError(f"{given[0]} is for static scales, and no scheme here has one. Leave it out")
        return Plan(observer(DEFAULT), "what layers are given", *example(arguments), None, None, True)
    if not static:
        if given := _given(arguments, "calibrate", *DATA, "save_calibration", "calibration", "allow_uncalibrated"):
            raise OctavoError(f"{given[0]} is for static scales, and no scheme here has one. Use --scheme int8-static")
        return None
    chosen = observer(arguments.calibrate) if arguments.calibrate else None
    saved = _load(arguments.calibration) if arguments.calibration else None
    if saved is not None:
        source = ", ".join(arguments.calibration)
        return Plan(chosen, arguments.calibrate or "", None, None, source, saved, arguments.save_calibration)
    words = arguments.calibrate or DEFAULT
    text, data, source = example(arguments)
    return Plan(chosen or observer(words), words, text, data, source, None, arguments.save_calibration, by_data)


DATA = ("calibration_text", "calibration_windows", "data")


def example(arguments: argparse.Namespace) -> tuple[Text | None, Iterable[Any] | None, str]:
    """The text, or the batches, that the flags name, and what they are called; a model may bring its own instead."""
    from octavo.io import entry_point

    if arguments.data is not None:
        if given := _given(arguments, "calibration_text", "calibration_windows"):
            raise OctavoError(f"{given[0]} and --data name two kinds of data. Leave one out")
        return None, entry_point.data(arguments.data), arguments.data
    if entry_point.is_entry_point(arguments.model) or entry_point.is_entry_point(
        getattr(arguments, "architecture", None) or ""
    ):
        if given := _given(arguments, "calibration_text", "calibration_windows"):
            raise OctavoError(f"{given[0]} is for language models; name this model's data: --data MODULE:FUNCTION")
        return None, None, arguments.model
    text = measure.calibration_text(arguments)
    return text, None, text.source


def data_for(
    plan: Plan | None, arguments: argparse.Namespace, opened: "Opened", rules: "list[Rule]", screen: Screen
) -> "tuple[Calibration | list[Any] | None, dict[str, Any] | None]":
    """What ``quantize_`` takes as data, and what it is for the report: ``range``, ``batches``, ``source``."""
    if plan is None:
        return None, None
    if plan.by_data:
        kept = list(batches(plan.text, plan.data, arguments, opened))
        return kept, {"range": plan.words, "batches": len(kept), "source": plan.source}
    made = run(plan, arguments, opened, rules, screen)
    return made, {"range": plan.words or "as saved", "batches": made.batches, "source": plan.source}


def run(
    plan: Plan, arguments: argparse.Namespace, opened: "Opened", rules: "list[Rule]", screen: Screen
) -> "Calibration":
    """Let the data pass through the model, or take what was saved; keep it if asked to.

    Raises ``OctavoError`` if the data does, after what was seen before is kept.
    """
    from octavo.calibration.run import CalibrationInterrupted
    from octavo.ptq.quantize import prepare_calibration

    if plan.saved is not None:
        made = plan.saved if plan.observer is None else _adopted(plan.saved, plan.observer)
        _keep(made, plan.keep, screen)
        return made
    assert plan.observer is not None
    made = prepare_calibration(opened.model, rules, plan.observer)
    try:
        with screen.phase("calibrate"):
            made.run(opened.model, batches(plan.text, plan.data, arguments, opened), track=screen.track)
    except CalibrationInterrupted as error:
        cause = error.__cause__
        why = f"{cause}" if isinstance(cause, OctavoError) else f"{type(cause).__name__}: {cause}"
        if made.batches and plan.keep:
            _keep(made, plan.keep, screen)
            after = f"What was seen until then is in {plan.keep}; use it with --calibration, or mend the data"
        else:
            after = "Mend the data; --save-calibration FILE keeps what the batches before have shown"
        raise OctavoError(f"calibration stopped in batch {made.batches}: {why}. {after}") from error
    except KeyboardInterrupt:
        if made.batches:
            _keep(made, plan.keep, screen)
        raise
    _keep(made, plan.keep, screen)
    return made


def batches(
    text: Text | None, data: Iterable[Any] | None, arguments: argparse.Namespace, opened: "Opened"
) -> Iterable[Any]:
    """What enters the model: the data that was named or came with the model, or windows of the text."""
    from octavo.io import text as texts

    if data is not None or opened.batches is not None:
        return data if data is not None else opened.batches
    model, tokenizer = opened.model, opened.tokenizer
    reads = getattr(model, "main_input_name", None)
    if text is None or tokenizer is None or reads != "input_ids":
        why = "reads no text" if text is None or reads != "input_ids" else "comes without a tokenizer"
        raise OctavoError(f"{arguments.model} {why}, so name the data to calibrate with: --data MODULE:FUNCTION")
    length = measure.length(arguments, model)
    asked = arguments.calibration_windows or WINDOWS
    tokens = texts.windows(tokenizer, text.content, length, asked)
    if len(tokens) < asked and arguments.calibration_windows:
        tell("note", f"{text.source} holds {count(len(tokens), 'window')} of {length} tokens to calibrate with")
    named = ["input_ids", *(["decoder_input_ids"] if getattr(model.config, "is_encoder_decoder", False) else [])]
    return [dict.fromkeys(named, part) for part in tokens.split(measure.BATCH)]


def check_file(file: str | None) -> None:
    """Refuse a name that could not be written to after all the work."""
    from octavo.io.folder import did_you_mean

    if file is None:
        return
    path = Path(file)
    if not file or path.is_dir():
        raise OctavoError(f"{file!r} is no name for a file to write")
    if not path.absolute().parent.is_dir():
        raise OctavoError(f"{file}: there is no folder {path.parent}.{did_you_mean(path.parent)}")


def _check(arguments: argparse.Namespace) -> None:
    check_file(arguments.save_calibration)
    if arguments.calibration and (given := _given(arguments, *DATA)):
        raise OctavoError(f"{given[0]} names data, and --calibration what was seen already. Leave one out")
    if arguments.dry_run and arguments.save_calibration:
        raise OctavoError("--dry-run runs no data, so there is nothing for --save-calibration. Leave one out")


def _given(arguments: argparse.Namespace, *names: str) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name, None)]


def _load(files: list[str]) -> "Calibration":
    """What several files hold, as if their data had come one after the other."""
    from octavo.calibration.run import Calibration

    first, *others = files
    made = Calibration.load(first)
    for file in others:
        try:
            made.merge(Calibration.load(file))
        except OctavoError as error:
            raise OctavoError(f"{first} and {file} cannot be taken together: {error}") from error
    return made


def _adopted(saved: "Calibration", like: "Observer") -> "Calibration":
    """Another range made of the same numbers, where enough of them was kept."""
    from octavo.calibration.run import Calibration

    made = {}
    for name, seen in saved.observers.items():
        fresh = like.fresh(seen.granularity)
        try:
            made[name] = seen if seen.settings() == fresh.settings() else fresh.adopt(seen)
        except OctavoError as error:
            raise OctavoError(
                f"layer {name}: {error}. Calibrate with the range you want, or leave out --calibrate"
            ) from error
    calibration = Calibration(made)
    calibration.batches = saved.batches
    return calibration


def _keep(made: "Calibration", file: str | None, screen: Screen) -> None:
    if file is None:
        return
    try:
        made.save(file)
    except OSError as error:
        raise OctavoError(f"{file} cannot be written ({error.strerror}). Name another file") from error
    screen.written = file
