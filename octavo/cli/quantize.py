"""``octavo quantize``: open a model, make its layers 8-bit, say what that cost, write the folder.

Whatever can be refused is refused before the model is opened (flags, output folder, text) or before it is evaluated
(rules that match nothing, a layout that cannot hold a layer).
"""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.cli import measure, report, schemes
from octavo.cli.console import Screen, count, tell
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.core.schemes import Scheme
    from octavo.io.huggingface import Source
    from octavo.nn.swap import Layer
    from octavo.ptq.rules import Rule

LAYOUTS = ("auto", "compressed-tensors", "octavo")
HELP = (
    "make a model's layers 8-bit and write a checkpoint folder",
    """\
Makes the linear layers of a model 8-bit, reports for each what it saved and cost, measures the
perplexity before and after on the same text, and writes a folder that transformers, vLLM or
Octavo opens. The folder appears whole or not at all.""",
    f"""\
{schemes.SCHEMES_HELP}

examples:
  octavo quantize demo --out small
  octavo quantize FOLDER --scheme fp8-dynamic --skip '*.layers.0.*' --out small
  octavo quantize FOLDER --weights e4m3fn --weight-group 128 --dry-run""",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, .gguf file, hub name, or 'demo'")
    measure.dtype_flag(parser)
    schemes.add(parser)
    group = measure.add(parser)
    group.add_argument("--no-evaluate", action="store_true", help="do not measure the perplexity")
    group = parser.add_argument_group("what is written")
    group.add_argument("--out", metavar="DIR", help="the folder to write; it must not exist or be empty")
    group.add_argument("--force", action="store_true", help="replace the checkpoint that is in DIR")
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="auto",
        help="compressed-tensors is what vLLM and transformers read, octavo holds every scheme and is read by "
        "octavo.load only (default: auto, the former where it can hold the model)",
    )
    group.add_argument("--dry-run", action="store_true", help="only show which layer would become what")


@dataclass(frozen=True)
class Plan:
    """Which layer becomes what, in which layout it will be written, and why that is not the common one."""

    verdict: "dict[Layer, Scheme | str]"
    layout: str
    why: str


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Check, open, measure, quantize, measure, write, report."""
    from octavo.io import checkpoint, folder, huggingface
    from octavo.ptq.quantize import quantize_

    _check_flags(arguments)
    if arguments.out is not None:
        folder.check_output(arguments.out, arguments.force)
        _check_not_source(arguments)
    rules = schemes.rules(arguments)
    text = None if arguments.no_evaluate or arguments.dry_run else measure.read(arguments)
    with screen.phase("load", f"opening {arguments.model}"):
        source = huggingface.open_model(arguments.model, measure.dtype(arguments.dtype))
    plan = make_plan(source, rules, arguments.layout)
    if arguments.dry_run:
        report.plan(screen, arguments.model, plan)
        return
    if plan.layout == "octavo" and arguments.layout == "auto":
        tell("note", f"{arguments.out} will be in Octavo's own layout, which only octavo.load opens: {plan.why}")

    tokens, before, after = None, None, None
    unmeasured = "--no-evaluate" if text is None else measure.obstacle(source.model, source.tokenizer) or ""
    if text is not None and not unmeasured:
        tokens = measure.windows(arguments, text, source.model, source.tokenizer)
        before = measure.perplexity(source.model, tokens, screen, "evaluate before")
    shared = report.shared(plan.verdict)
    with screen.phase("quantize"):
        summary = quantize_(source.model, rules, track=screen.track)
    if tokens is not None:
        after = measure.perplexity(source.model, tokens, screen, "evaluate after")
    with screen.phase("save", f"writing {arguments.out}"):
        checkpoint.save(source.model, arguments.out, plan.layout, source.tokenizer, arguments.force)
    screen.written = arguments.out
    report.done(
        screen,
        report.Result(
            model=arguments.model,
            kind=type(source.model).__name__,
            causal=measure.obstacle(source.model, True) is None,
            out=arguments.out,
            plan=plan,
            summary=summary,
            shared=shared,
            before=before,
            after=after,
            over=measure.on(tokens, text) if tokens is not None and text is not None else "",
            unmeasured=unmeasured,
        ),
    )


def make_plan(source: "Source", rules: "list[Rule]", layout: str) -> Plan:
    """Apply the rules to the opened model. Raises ``OctavoError`` on a rule without a match or an impossible layout."""
    from octavo.core.schemes import Scheme
    from octavo.io import compressed_tensors
    from octavo.ptq.quantize import check

    verdict = check(source.model, rules)
    chosen = {layer: scheme for layer, scheme in verdict.items() if isinstance(scheme, Scheme)}
    obstacles = {
        x.name: why
        for x, scheme in chosen.items()
        if (why := compressed_tensors.obstacle_for(x.module, scheme))
    }
    if not obstacles:
        return Plan(verdict, "compressed-tensors" if layout == "auto" else layout, "")
    name, why = next(iter(obstacles.items()))
    why = f"{name}: {why}" + (f" (and {count(len(obstacles) - 1, 'other layer')})" if len(obstacles) > 1 else "")
    if layout == "compressed-tensors":
        raise OctavoError(f"compressed-tensors cannot hold this model: {why}. Use --layout octavo or another scheme")
    return Plan(verdict, "octavo", why)


def _check_not_source(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    source, out = Path(arguments.model), Path(arguments.out).resolve()
    if source.exists() and (out == source.resolve() or out in source.resolve().parents):
        raise OctavoError(f"--out {arguments.out} would replace the model itself; name another folder")


def _check_flags(arguments: argparse.Namespace) -> None:
    if arguments.out is None and not arguments.dry_run:
        raise OctavoError("--out DIR is missing: the folder to write. To look first, use --dry-run")
    if arguments.no_evaluate and (given := [f for f in ("text", "windows", "window") if getattr(arguments, f)]):
        raise OctavoError(f"--{given[0]} says what to evaluate on, and --no-evaluate that nothing is. Leave one out")
