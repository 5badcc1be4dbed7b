"""``octavo quantize --stream``: from file to file, for checkpoints that are larger than the memory."""

import argparse
import resource
import sys
from typing import TYPE_CHECKING, Any

from octavo.cli import measure, report, schemes
from octavo.cli.console import Screen, count, mb, tell
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.io import stream

#: What would have the model run, which is never built.
RUNNING = (
    *("text", "windows", "window", "evaluate", "data", "calibrate", "calibration", "calibration_text"),
    *("calibration_windows", "save_calibration", "calibrate_weights", "allow_uncalibrated", "smooth"),
)


def flag(group: Any) -> None:
    """The flag that asks for it."""
    group.add_argument(
        "--stream",
        action="store_true",
        help="for checkpoints larger than the memory: read, quantize and write a part after the other, without "
        "building the model; weight-only and dynamic schemes, no perplexity. If it is killed, run the same again",
    )


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Plan from headers, write the folder or go on with it, report."""
    from octavo.cli.quantize import Plan
    from octavo.io import entry_point, folder, stream

    if given := [name for name in RUNNING if getattr(arguments, name, None)]:
        word = given[0].replace("_", "-")
        raise OctavoError(f"--{word} has the model run, and --stream never builds it. Leave one out")
    if entry_point.is_entry_point(arguments.model):
        raise OctavoError(f"--stream reads the files of a checkpoint, and {arguments.model} is a Python function")
    with screen.phase("plan", f"reading the headers of {arguments.model}"):
        plan = stream.plan(arguments.model, schemes.rules(arguments), arguments.layout, measure.dtype(arguments.dtype))
    if arguments.dry_run:
        report.plan(screen, arguments.model, Plan(plan.verdict, plan.layout, plan.why))
        return
    if plan.layout == "octavo" and arguments.layout == "auto":
        tell("note", f"{arguments.out} will be in Octavo's own layout, which only octavo.load opens: {plan.why}")
    kept = f"what is written is kept in {folder.unfinished(arguments.out)}: run the same again to go on, or remove it"
    try:
        with screen.transfer(plan.bytes_before, "quantizing") as advance:
            result = stream.run(plan, arguments.out, arguments.force, advance)
    except KeyboardInterrupt:
        screen.kept = kept
        raise
    except SystemExit:  # SIGTERM
        tell("error", f"stopped; {kept}")
        raise
    screen.written = arguments.out
    screen.seconds["stream"] = result.seconds
    _report(screen, arguments, plan, result)


def _report(screen: Screen, arguments: argparse.Namespace, plan: "stream.Plan", result: "stream.Result") -> None:
    from octavo.cli.quantize import Plan
    from octavo.ptq.quantize import Summary

    model, layers = plan.source.model, plan.reports()
    rate, peak = result.read / 1e6 / result.seconds, _peak_memory()
    before, after = plan.bytes_before, plan.bytes_after
    told = report.Result(
        model=arguments.model,
        kind=type(model).__name__,
        transformers=True,
        causal=measure.obstacle(model, True) is None,
        out=arguments.out,
        plan=Plan(plan.verdict, plan.layout, plan.why),
        summary=Summary(layers, before, after, result.seconds),
        shared=report.shared(plan.verdict),
        calibrated=None,
        judge="the model was never built",
        before=None,
        after=None,
    )
    report.layers_table(screen, layers, told.shared)
    screen.say()
    screen.facts({"size": f"{mb(before)} MB → {mb(after)} MB ({before / after:.2f} times smaller)"}, "bold")
    if result.resumed:
        screen.facts({"resumed": f"after {mb(result.resumed)} MB that an earlier run had read"})
    screen.facts({"speed": f"{mb(result.read)} MB read in {result.seconds:.1f} s, {rate:,.0f} MB/s"})
    screen.facts({"memory": f"{mb(peak)} MB at most"})
    screen.facts({"written": f"{arguments.out}  ({plan.layout}, {count(len(result.files), 'file')})"}, "bold green")
    report.say_openers(screen, told)
    screen.result(
        {
            "model": arguments.model,
            "class": told.kind,
            "out": arguments.out,
            "layout": plan.layout,
            "layout_reason": plan.why or None,
            "bytes_before": before,
            "bytes_after": after,
            "bytes_resumed": result.resumed,
            "megabytes_per_second": rate,
            "peak_memory_bytes": peak,
            "seconds": screen.seconds,
            "files": result.files,
            "open_with": report.openers(told),
            "layers": [
                {"name": x.name, "kind": x.kind, "scheme": x.scheme, "reason": x.reason or None}
                | {"bytes_before": x.bytes_before, "bytes_after": x.bytes_after}
                for x in layers
            ],
        }
    )


def _peak_memory() -> int:
    """The most bytes that this process had resident."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
