"""``octavo quantize``: open a model, calibrate it, make its layers 8-bit, say what that cost, write the folder.

Whatever can be refused is refused before the model is opened (flags, output folder, text) or before it is evaluated
(rules that match nothing, a layout that cannot hold a layer).
"""

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo.cli import calibrate, measure, opening, report, schemes, search, stream
from octavo.cli.console import Screen, count, tell
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.cli.opening import Opened
    from octavo.core.schemes import Scheme
    from octavo.nn.swap import Layer
    from octavo.ptq.rules import Rule

RULES = "rules.json"
LAYOUTS = ("auto", "compressed-tensors", "octavo")
HELP = (
    "make a model's layers 8-bit and write a checkpoint folder",
    """\
Makes the layers of a model 8-bit, reports for each what it saved and cost, measures the
perplexity before and after on the same text, and writes a folder that transformers, vLLM or
Octavo opens. The folder appears whole or not at all.

Without a scheme it chooses one for every layer: the fastest mix that raises the loss by no more
than a budget, or the smallest if that is asked for or nothing is faster. It tries every layer
under every scheme on text that the perplexity is not measured on. DIR/rules.json then says what
was chosen; edit it and come back with --rules.

Static schemes fix the scales of the inputs beforehand, by passing example data through the model:
text, of which the parts are used that the perplexity is not measured on, or --data.

A network of your own is named by the function that makes it, `package.module:function`, which
returns the model or (model, batches to calibrate with); --evaluate names a function that judges
it. They are found in the current folder and on PYTHONPATH.""",
    f"""\
{schemes.SCHEMES_HELP}

{calibrate.OBSERVERS_HELP}

examples:
  octavo quantize demo --out small
  octavo quantize FOLDER --budget 0.3% --for vllm --html why.html --out small
  octavo quantize FOLDER --scheme fp8-dynamic --skip '*.layers.0.*' --out small
  octavo quantize FOLDER --weights e4m3fn --weight-group 128 --dry-run
  octavo quantize FOLDER --stream --out small
  octavo quantize FOLDER --scheme int8-static --calibrate percentile=99.99 --out small
  octavo quantize FOLDER --smooth 0.6 --out small
  octavo quantize FOLDER --rules rules.json --out small
  octavo quantize vision:resnet --data vision:pictures --evaluate vision:accuracy \\
      --scheme int8-static --out small""",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help=opening.MODEL)
    measure.dtype_flag(parser)
    schemes.add(parser)
    search.add(parser)
    calibrate.add(parser)
    group = measure.add(parser)
    group.add_argument("--no-evaluate", action="store_true", help="do not judge the model")
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
    stream.flag(group)


@dataclass(frozen=True)
class Plan:
    """Which layer becomes what, in which layout it will be written, and why that is not the common one."""

    verdict: "dict[Layer, Scheme | str]"
    layout: str
    why: str


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Check, open, measure, calibrate, quantize, measure, write, report."""
    from octavo.calibration.minmax import MinMax
    from octavo.io import checkpoint, folder
    from octavo.ptq.quantize import quantize_
    from octavo.ptq.rules import write_rules

    _check_flags(arguments)
    if arguments.out is not None:
        folder.check_output(arguments.out, arguments.force)
        _check_not_source(arguments)
    if arguments.stream:
        stream.run(arguments, screen)
        return
    auto = arguments.scheme.lower() == schemes.AUTO
    rules = [] if auto else schemes.rules(arguments)
    weight_observer = calibrate.observer(arguments.calibrate_weights) if arguments.calibrate_weights else None
    ranges = None if auto else calibrate.plan(arguments, rules)
    unjudged = arguments.no_evaluate or arguments.dry_run or arguments.out is None
    by = None if unjudged else measure.read(arguments)
    with screen.phase("load", f"opening {arguments.model}"):
        opened = opening.float_model(arguments)
    model = opened.model
    found = search.run(arguments, opened, screen) if auto else None
    rules = rules if found is None else list(found.choice.rules)
    plan = make_plan(opened, rules, arguments.layout)
    if arguments.dry_run:
        if found is not None:
            search.write_page(arguments.html, found.comparison, found.choice, found.numbers)
        report.plan(screen, arguments.model, plan, None if found is None else found.choice, arguments.html)
        return
    if plan.layout == "octavo" and arguments.layout == "auto" and arguments.out is not None:
        tell("note", f"{arguments.out} will be in Octavo's own layout, which only octavo.load opens: {plan.why}")

    judge = "--no-evaluate" if unjudged else measure.judge(arguments, by, opened, screen)
    before = None if isinstance(judge, str) else judge.measure(model, "evaluate before")
    if found is None:
        data, calibrated = calibrate.data_for(ranges, arguments, opened, rules, screen)
    else:
        data, calibrated = found.data, found.told
    if arguments.out is None:
        report.calibrated(screen, arguments.model, arguments.save_calibration, calibrated or {})
        return
    shared = report.shared(plan.verdict)
    with screen.phase("quantize"):
        summary = quantize_(
            model,
            rules,
            data,
            observer=MinMax() if ranges is None or ranges.observer is None else ranges.observer,
            weight_observer=weight_observer,
            allow_uncalibrated=arguments.allow_uncalibrated,
            track=screen.track,
        )
    layout, why = checkpoint.layout_for(model)
    if arguments.layout == "auto" and layout != plan.layout:  # an observer has chosen another format
        plan = replace(plan, layout=layout, why=why)
    after = None if isinstance(judge, str) else judge.measure(model, "evaluate after")
    with screen.phase("save", f"writing {arguments.out}"):
        checkpoint.save(model, arguments.out, plan.layout, opened.tokenizer, arguments.force)
    screen.written = arguments.out
    if auto:
        write_rules(rules, f"{arguments.out}/{RULES}")
    result = report.Result(
        model=arguments.model,
        kind=type(model).__name__,
        transformers=checkpoint.is_transformers(model),
        causal=measure.obstacle(model, True) is None,
        out=arguments.out,
        plan=plan,
        summary=summary,
        shared=shared,
        calibrated=calibrated,
        judge=judge,
        before=None if before is None else before.value,
        after=None if after is None else after.value,
        choice=None if found is None else found.choice,
        page=arguments.html,
        with_batches=opened.batches is not None,
    )
    if found is not None and arguments.html is not None:
        with screen.phase("page", "drawing the page"):
            search.write_page(arguments.html, found.comparison, found.choice, found.numbers, report.unseen(result))
    report.done(screen, result)


def make_plan(opened: "Opened", rules: "list[Rule]", layout: str) -> Plan:
    """Apply the rules to the opened model. Raises ``OctavoError`` on a rule without a match or an impossible layout."""
    from octavo.core.schemes import Scheme
    from octavo.io import checkpoint, compressed_tensors
    from octavo.ptq.quantize import check

    verdict = check(opened.model, rules)
    chosen = {layer: scheme for layer, scheme in verdict.items() if isinstance(scheme, Scheme)}
    obstacles = {
        x.name: why for x, scheme in chosen.items() if (why := compressed_tensors.obstacle_for(x.module, scheme))
    }
    if not checkpoint.is_transformers(opened.model):
        why = f"{type(opened.model).__name__} is not a transformers model"
    elif obstacles:
        name, why = next(iter(obstacles.items()))
        why = f"{name}: {why}" + (f" (and {count(len(obstacles) - 1, 'other layer')})" if len(obstacles) > 1 else "")
    else:
        return Plan(verdict, "compressed-tensors" if layout == "auto" else layout, "")
    if layout == "compressed-tensors":
        raise OctavoError(f"compressed-tensors cannot hold this model: {why}. Use --layout octavo or another scheme")
    return Plan(verdict, "octavo", why)


def _check_not_source(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    source, out = Path(arguments.model), Path(arguments.out).resolve()
    if source.exists() and (out == source.resolve() or out in source.resolve().parents):
        raise OctavoError(f"--out {arguments.out} would replace the model itself; name another folder")


def _check_flags(arguments: argparse.Namespace) -> None:
    schemes.settle(arguments)
    search.check(arguments)
    if arguments.out is None and not (arguments.dry_run or arguments.save_calibration):
        raise OctavoError("--out DIR is missing: the folder to write. To look first, use --dry-run")
    by = [flag for flag in ("text", "windows", "window", "evaluate") if getattr(arguments, flag)]
    if arguments.no_evaluate and by:
        raise OctavoError(f"--{by[0]} says what to evaluate by, and --no-evaluate that nothing is. Leave one out")
