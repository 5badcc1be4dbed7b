"""``octavo experiment``: published results, recomputed and compared."""

import argparse
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.console import Screen, count, table

if TYPE_CHECKING:
    from octavo.analysis.experiment import Check, Experiment, Outcome, Table

HELP = (
    "published results on number formats, recomputed here",
    """\
Runs the experiments of the repository's folder `experiments`: each recomputes a paper's figure
or table, and says target by target whether ours agrees. Tables come to the terminal; CSV files,
plots and an HTML page go to a folder.

exit code: 0 if every checked target is met, 1 if one is missed""",
    """\
examples:
  octavo experiment list
  octavo experiment run bits-of-accuracy
  octavo experiment run swamping --quick --seed 7 --out try
  octavo experiment run all

To change a format, an accumulator or a distribution, change one line of experiments/NAME/run.py.""",
)
OUT = "octavo-results"
COLOURS = {"pass": "green", "MISS": "bold red"}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", metavar="{list,run}", nargs="?", default="list", help="(default: list)")
    parser.add_argument("names", metavar="NAME", nargs="*", help="what to run: names from the list, or 'all'")
    parser.add_argument("--quick", action="store_true", help="smaller samples; targets that need more are left out")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of every random number (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR", help=f"results go here (default: {OUT})")
    parser.add_argument(
        "--from", dest="folder", type=Path, metavar="DIR", help="the folder of experiments (default: the repository's)"
    )


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """List the experiments, or run some."""
    from octavo.analysis import experiment
    from octavo.errors import OctavoError

    folder = arguments.folder or experiment.find_folder()
    known = experiment.names(folder)
    if not known:
        raise OctavoError(f"there are no experiments in {folder}; a folder of them holds NAME/run.py")
    if arguments.what not in ("list", "run"):
        hint = f"; to run it: octavo experiment run {arguments.what}" if arguments.what in (*known, "all") else ""
        raise OctavoError(f"`octavo experiment` takes list or run, not {arguments.what!r}{hint}")
    if arguments.what == "list":
        if arguments.names:
            raise OctavoError(f"`list` takes no names; to run it: octavo experiment run {arguments.names[0]}")
        _list([experiment.load(name, folder) for name in known], screen)
        return
    if not arguments.names:
        raise OctavoError(f"name what to run: {', '.join(known)}, or all")
    whole = "all" in arguments.names
    chosen = [experiment.load(name, folder) for name in (known if whole else dict.fromkeys(arguments.names))]
    _run(chosen, whole, arguments, screen)


def _run(chosen: "list[Experiment]", whole: bool, arguments: argparse.Namespace, screen: Screen) -> None:
    from octavo.report import files, html, markdown

    out: Path = arguments.out
    files.check_folder(out)
    about, outcomes = _about(arguments), []
    screen.say(about)
    for index, one in enumerate(chosen):
        place = f"{index + 1}/{len(chosen)} " if len(chosen) > 1 else ""

        def track(items: list[Any], label: str, prefix: str = f"{place}{one.name}: ") -> Any:
            return screen.track(items, prefix + label)

        outcome = one.run(arguments.quick, arguments.seed, track)
        outcomes.append(outcome)
        files.write(out, _files(outcome))
        screen.written = str(out / outcome.name)
        if len(chosen) == 1:
            _details(outcome, screen)
        else:
            _line(outcome, screen)
    page = out / "report.html" if len(chosen) > 1 else out / chosen[0].name / "report.html"
    with screen.phase("report", "drawing"):
        files.write(page.parent, {page.name: html.page(outcomes, about)})
    results = _results_page(chosen[0].folder.parent) if whole and not arguments.quick else None
    if results:
        files.write(results.parent, {results.name: markdown.page(outcomes, about).encode()})
    missed = sum(len(outcome.missed) for outcome in outcomes)
    met = sum(outcome.met for outcome in outcomes)
    screen.say()
    screen.say(f"targets  {met} of {met + missed} met", style="bold green" if not missed else "bold red")
    screen.say(f"time     {sum(outcome.seconds for outcome in outcomes):.1f} s")
    screen.say(f"written  {page}" + (f" and {results}" if results else ""))
    screen.result(
        {
            "about": about,
            "seed": arguments.seed,
            "quick": arguments.quick,
            "experiments": [_document(outcome) for outcome in outcomes],
            "met": met,
            "missed": missed,
            "report": str(page),
            "results": str(results) if results else None,
        }
    )
    if missed:
        raise SystemExit(1)


def _list(found: "list[Experiment]", screen: Screen) -> None:
    shown = table("name", "targets", "about", right=("targets",), fold=("about",))
    for one in found:
        shown.add_row(one.name, str(len(one.targets)), one.title)
    screen.say(shown)
    screen.say("\noctavo experiment run NAME runs one, octavo experiment run all runs them all.")
    screen.result(
        {
            "experiments": [
                {
                    "name": one.name,
                    "title": one.title,
                    "claim": one.claim,
                    "folder": str(one.folder),
                    "targets": len(one.targets),
                    "parameters": list(one.parameters),
                }
                for one in found
            ]
        }
    )


def _details(outcome: "Outcome", screen: Screen) -> None:
    if screen.as_json:
        return
    screen.say(f"\n{outcome.title}", style="bold")
    screen.say(outcome.claim)
    for one in outcome.result.tables:
        screen.say()
        screen.say(one.title, style="bold")
        screen.say(_table(one))
    for note in outcome.result.notes:
        screen.say()
        screen.say(note)
    screen.say()
    screen.say("Targets", style="bold")
    screen.say(_checks(outcome.checks))
    _reasons(outcome, screen)


def _line(outcome: "Outcome", screen: Screen) -> None:
    checked = outcome.met + len(outcome.missed)
    words = f"{outcome.name:<26}{outcome.met:>3} of {checked:>3} met  {outcome.seconds:>6.1f} s"
    screen.say(words, style="red" if outcome.missed else None)
    _reasons(outcome, screen)


def _reasons(outcome: "Outcome", screen: Screen) -> None:
    from octavo.report.files import number

    for check in outcome.missed:
        t = check.target
        screen.say(
            f"  MISS {t.name}: {number(check.ours)} {t.unit}, not {number(t.value)} {t.tolerance}: {check.reason}",
            style="red",
        )


def _table(one: "Table") -> Any:
    from octavo.report.files import number

    words = [name for i, name in enumerate(one.columns) if all(isinstance(row[i], str) for row in one.rows)]
    shown = table(*one.columns, right=set(one.columns) - set(words), fold=one.columns)
    for row in one.rows:
        shown.add_row(*(number(cell, one.digits) for cell in row))
    return shown


def _checks(checks: "tuple[Check, ...]") -> Any:
    from octavo.report.files import number

    columns = ("target", "value", "tolerance", "ours", "unit", "verdict")
    shown = table(*columns, right=columns[1:4], fold=("target", "tolerance", "unit", "verdict"))
    for check in checks:
        t, style = check.target, COLOURS.get(check.verdict)
        ours = number(check.ours)
        shown.add_row(t.name, number(t.value), t.tolerance, ours, t.unit, check.verdict, style=style)
    return shown


def _files(outcome: "Outcome") -> dict[str, bytes]:
    from octavo.report import files, plots

    made: dict[str, bytes] = {}
    for one in outcome.result.tables:
        made[f"{outcome.name}/{one.name}.csv"] = files.table_csv(one)
    for plot in outcome.result.plots:
        made[f"{outcome.name}/{plot.name}.png"] = plots.png(plot)
        made[f"{outcome.name}/{plot.name}-plot.csv"] = files.plot_csv(plot)
    made[f"{outcome.name}/targets.csv"] = files.checks_csv(outcome.checks)
    return made


def _document(outcome: "Outcome") -> dict[str, Any]:
    return {
        "name": outcome.name,
        "title": outcome.title,
        "seconds": outcome.seconds,
        "values": dict(outcome.result.values),
        "targets": [
            {
                "name": check.target.name,
                "value": check.target.value,
                "tolerance": check.target.tolerance,
                "source": check.target.source,
                "unit": check.target.unit,
                "ours": check.ours,
                "verdict": check.verdict,
                "reason": check.reason or None,
            }
            for check in outcome.checks
        ],
        "notes": list(outcome.result.notes),
    }


def _results_page(folder: Path) -> Path | None:
    """``docs/results.md`` of the repository that the experiments are part of, if they are part of one."""
    root = folder.resolve().parent
    return root / "docs" / "results.md" if (root / "pyproject.toml").is_file() and (root / "docs").is_dir() else None


def _about(arguments: argparse.Namespace) -> str:
    import torch

    import octavo

    threads = count(torch.get_num_threads(), "thread")
    return (
        f"Seed {arguments.seed}{', quick' if arguments.quick else ''}; octavo {octavo.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {threads}."
    )


def _seed(text: str) -> int:
    """A seed that torch takes together with the few numbers that experiments add to it."""
    try:
        seed = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a seed is an integer, not {text!r}") from None
    if not 0 <= seed < 2**62:
        raise argparse.ArgumentTypeError(f"a seed lies between 0 and 2**62, {seed} does not")
    return seed
