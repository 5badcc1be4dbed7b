"""``octavo evaluate``: the perplexity of a float or an 8-bit model, or what a function of the user's says of it."""

import argparse

from octavo.cli import measure, opening
from octavo.cli.console import Screen
from octavo.errors import OctavoError

HELP = (
    "how well a model predicts text: its perplexity",
    """\
Measures perplexity, the number of next tokens that a language model hesitates between: 1 is
certainty, lower is better. Takes float models and folders that `octavo quantize` wrote; two
figures compare if text, windows and tokenizer are the same. Other models are judged by a Python
function of yours, see --evaluate.""",
    """\
examples:
  octavo evaluate demo
  octavo evaluate small --text novel.txt --windows 32
  octavo evaluate small --architecture vision:resnet --evaluate vision:accuracy""",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help=opening.ANY_MODEL)
    measure.dtype_flag(parser)
    opening.architecture_flag(parser)
    measure.add(parser)


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Open, measure, report."""
    by = measure.read(arguments)
    with screen.phase("load", f"opening {arguments.model}"):
        opened = opening.any_model(arguments)
    judge = measure.judge(arguments, by, opened, screen)
    if isinstance(judge, str):
        what = "is not judged" if by is None else "has no perplexity to measure"
        raise OctavoError(f"{arguments.model} {what}: {judge}")
    found = judge.measure(opened.model, "evaluate")
    seconds = screen.seconds["evaluate"]
    screen.facts({"model": f"{arguments.model}: {opened.numbers}"})
    told = {"model": arguments.model, "numbers": opened.numbers}
    if isinstance(found, measure.Score):
        screen.facts({judge.name: f"{found.value:.6g}"}, "bold")
        screen.facts({"over": f"{judge.over}, {seconds:.1f} s"})
        screen.result({**told, "score": {"name": judge.name, "value": found.value}, "seconds": screen.seconds})
        return
    assert judge.tokens is not None
    tokens = judge.tokens
    screen.facts({"perplexity": f"{found.value:.3f}"}, "bold")
    screen.facts({"over": judge.over, "speed": f"{tokens.numel() / seconds:,.0f} tokens/s, {seconds:.1f} s"})
    screen.result(
        {
            **told,
            "perplexity": found.value,
            "loss": found.loss,
            "tokens": found.tokens,
            "windows": tokens.shape[0],
            "window": tokens.shape[1],
            "text": by.source if isinstance(by, measure.Text) else None,
            "tokens_per_second": tokens.numel() / seconds,
            "seconds": screen.seconds,
        }
    )
