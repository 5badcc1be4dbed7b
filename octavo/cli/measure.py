"""The perplexity that ``quantize`` and ``evaluate`` report: the same text, the same windows, the same words."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.cli.console import Screen, count, tell
from octavo.cli.schemes import positive
from octavo.errors import OctavoError

if TYPE_CHECKING:
    import torch

    from octavo.analysis.perplexity import Perplexity

WINDOWS, WINDOW = 16, 512
BATCH = 2  # windows at a time: logits are large, and little is won by more
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Text:
    """The half of a text that models are judged by, and where it comes from."""

    content: str
    source: str


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


def read(arguments: argparse.Namespace) -> Text:
    """The text, looked at before any model is opened."""
    from octavo.io import text

    if arguments.window == 1:
        raise OctavoError("--window 1 leaves no token to predict; a window has 2 tokens or more")
    content = text.split(text.read_text(arguments.text))[1]
    return Text(content, arguments.text or "Python's language reference")


def obstacle(model: Any, tokenizer: Any) -> str | None:
    """Why perplexity cannot be measured, or None."""
    from octavo.analysis import perplexity

    return perplexity.obstacle(model) or ("the model comes without a tokenizer" if tokenizer is None else None)


def windows(arguments: argparse.Namespace, text: Text, model: Any, tokenizer: Any) -> "torch.Tensor":
    """The text as the token windows [count, length] that the flags ask for and the model can take."""
    from octavo.io import text as texts

    most = getattr(model.config, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 1 else None
    length = arguments.window or min(WINDOW, most or WINDOW)
    if most is not None and length > most:
        raise OctavoError(f"--window {length} is longer than the {most} tokens that the model can take")
    asked = arguments.windows or WINDOWS
    found = texts.windows(tokenizer, text.content, length, asked)
    if len(found) < asked:
        held = count(len(found), "window")
        tell("note", f"the part of {text.source} to judge by holds {held} of {length} tokens, not {asked}")
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
