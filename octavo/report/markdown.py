"""``docs/results.md``: every target with ours beside it, as one Markdown page."""

from octavo.analysis.experiment import Outcome
from octavo.report.files import number

HEAD = """\
# Published results, recomputed

Written by `octavo experiment run all`; do not edit. {about}

`published`: the paper's figure or table. `computed`: by an independent script, see each experiment's `expected.json`.
"""


def page(outcomes: list[Outcome], about: str) -> str:
    """The whole page."""
    parts = [HEAD.format(about=about), _row(["experiment", "targets met", "not checked", "seconds"]), _rule("lrrr")]
    for outcome in outcomes:
        checked = outcome.met + len(outcome.missed)
        aside = sum(check.verdict == "not checked" for check in outcome.checks)
        link = f"[{outcome.name}](#{outcome.name})"
        parts.append(_row([link, f"{outcome.met} of {checked}", str(aside), f"{outcome.seconds:.1f}"]))
    for outcome in outcomes:
        parts += ["", f"## {outcome.name}", "", f"{outcome.title}. {outcome.claim}", ""]
        parts.append(f"Seed {outcome.seed}. How: [README](../experiments/{outcome.name}/README.md).")
        parts += ["", *(line for note in outcome.result.notes for line in (note, ""))]
        parts += [_row(["target", "value", "tolerance", "ours", "unit", "verdict", "source, and remarks"])]
        parts.append(_rule("lrrrlll"))
        for check in outcome.checks:
            t = check.target
            source = ", ".join(word for word in (t.source, t.where) if word)
            remark = f"{source}. {check.reason}" if check.reason else source
            ours = number(check.ours)
            parts.append(_row([t.name, number(t.value), t.tolerance, ours, t.unit, check.verdict, remark]))
    return "\n".join(parts) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _rule(sides: str) -> str:
    return "|" + "|".join("---:" if side == "r" else "---" for side in sides) + "|"
