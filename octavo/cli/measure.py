"""How ``quantize`` and ``evaluate`` judge a model: by its perplexity on a text, or by a function of the user's.

A text is dealt out into two parts, none of whose paragraphs are in both: one to calibrate on, one to judge by.
"""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.cli.console import Screen, count, tell
from octavo.cli.schemes import positive
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from octavo.analysis.perplexity import Perplexity
    from octavo.cli.opening import Opened

WINDOWS, WINDOW = 16, 512
BATCH = 2  # windows at a time: logits are large, and little is won by more
DTYPES = ("auto", "float32", "bfloat16", "float16")
PROSE = "Python's language reference"
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Text:
    """One part of a text, and where it comes from."""

    content: str
    source: str


@dataclass(frozen=True)
class Function:
    """A function of the user's that takes a model and returns one number; where it was found."""

    call: "Callable[[Any], float]"
    source: str


@dataclass(frozen=True)
class Score:
    """What such a function said of a model."""

    value: float


@dataclass(frozen=True)
class Judge:
    """What a model is judged by: the figure's name, over what it is had, and how; ``tokens`` as they are judged."""

    name: str
    over: str
    measure: "Callable[[Any, str], Perplexity | Score]"
    tokens: "torch.Tensor | None" = None


def add(parser: argparse.ArgumentParser) -> Any:
    """The flags that say what a model is judged by."""
    group = parser.add_argument_group("how it is judged")
    group.add_argument(
        "--text", metavar="FILE", help="UTF-8 text; every other part of it is used (default: Python's docs)"
    )
    group.add_argument("--windows", type=positive, metavar="N", help=f"pieces of text (default: {WINDOWS})")
    group.add_argument(
        "--window",
        type=positive,
        metavar="LENGTH",
        help=f"tokens a piece (default: {WINDOW}, or what the model can take)",
    )
    group.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="judge by a Python function instead, which takes the model and returns one number",
    )
    return group


def dtype_flag(parser: argparse.ArgumentParser) -> None:
    """The dtype a float model is opened in."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="open the float model in this dtype (default: auto, its own)"
    )


def dtype(name: str) -> "torch.dtype | None":
    """What ``--dtype`` says; None is the model's own."""
    import torch

    return None if name == "auto" else {d: getattr(torch, d) for d in DTYPES[1:]}[name]


def read(arguments: argparse.Namespace) -> "Text | Function | None":
    """The text or the function to judge by, looked at before any model is opened; None for models without a text."""
    from octavo.io import entry_point, text

    if arguments.evaluate is not None:
        if given := [f for f in ("text", "windows", "window") if getattr(arguments, f)]:
            raise OctavoError(f"--{given[0]} is for perplexity, and --evaluate judges by another figure. Leave one out")
        return Function(entry_point.measure(arguments.evaluate), arguments.evaluate)
    if entry_point.is_entry_point(arguments.model):
        return None
    if arguments.window == 1:
        raise OctavoError("--window 1 leaves no token to predict; a window has 2 tokens or more")
    return Text(text.split(text.read_text(arguments.text))[1], arguments.text or PROSE)


def calibration_text(arguments: argparse.Namespace) -> Text:
    """The part of a text that is never judged by: of ``--calibration-text``, or of the text to judge by."""
    from octavo.io import text

    file = arguments.calibration_text or getattr(arguments, "text", None)
    return Text(text.split(text.read_text(file))[0], f"{file or PROSE}, the part not judged by")


def judge(arguments: argparse.Namespace, by: "Text | Function | None", opened: "Opened", screen: Screen) -> Judge | str:
    """What the model is judged by, or in words why it is not."""
    if isinstance(by, Function):
        call = by.call

        def score(model: Any, name: str) -> Score:
            with screen.phase(name, f"{name}: {by.source}"):
                return Score(call(model))

        return Judge(by.source.rpartition(":")[2], f"by {by.source}", score)
    if by is None:
        return "no --evaluate MODULE:FUNCTION says by what"
    if why := obstacle(opened.model, opened.tokenizer):
        return why
    tokens = windows(arguments, by, opened.model, opened.tokenizer)

    def measure(model: Any, name: str) -> "Perplexity":
        return perplexity(model, tokens, screen, name)

    return Judge(PERPLEXITY, on(tokens, by), measure, tokens)


def obstacle(model: Any, tokenizer: Any) -> str | None:
    """Why perplexity cannot be measured, or None."""
    from octavo.analysis import perplexity

    return perplexity.obstacle(model) or ("the model comes without a tokenizer" if tokenizer is None else None)


def length(arguments: argparse.Namespace, model: Any) -> int:
    """Tokens a window, as the flags ask for and the model can take."""
    most = getattr(model.config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 1 else None
    asked: int | None = getattr(arguments, "window", None)
    if most is not None and (asked or 0) > most:
        raise OctavoError(f"--window {asked} is longer than the {most} tokens that the model can take")
    return asked or min(WINDOW, most or WINDOW)


def windows(arguments: argparse.Namespace, text: Text, model: Any, tokenizer: Any) -> "torch.Tensor":
    """The text as the token windows [count, length] that the flags ask for and the model can take."""
    from octavo.io import text as texts

    size, asked = length(arguments, model), arguments.windows or WINDOWS
    found = texts.windows(tokenizer, text.content, size, asked)
    if len(found) < asked:
        held = count(len(found), "window")
        tell("note", f"the part of {text.source} to judge by holds {held} of {size} tokens, not {asked}")
    return found


def perplexity(model: Any, tokens: "torch.Tensor", screen: Screen, name: str) -> "Perplexity":
    """Measure, with a bar, and keep the time under ``name``."""
    from octavo.analysis.perplexity import perplexity

    with screen.phase(name):
        return perplexity(model, tokens, BATCH, track=screen.track)


def on(tokens: "torch.Tensor", text: Text) -> str:
    """Over what it was measured, in words."""
    windows, length = tokens.shape
    predicted = windows * (length - 1)
    return f"{predicted:,} tokens ({count(windows, 'window')} of {length}) of {text.source}"
