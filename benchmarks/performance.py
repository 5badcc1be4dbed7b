"""``python -m benchmarks.performance [gemm model others compiled casts stream]``: speed, target by target, in docs/.

Sections may be run apart and by different interpreters: one with the peers (``pip install -e '.[peers]'``), where
``--no-peers`` is not said. What is not run again stays as it was measured last. Every section is one race, in which
all contenders take turns, so a ratio compares what was measured in the same minutes.
"""

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import octavo as ov
from benchmarks import streaming
from benchmarks.measure import markdown
from octavo.analysis import machine
from octavo.analysis.bench import language, linear, peers, roofline
from octavo.analysis.bench.race import Contender, Race, Task, Work
from octavo.analysis.bench.worker import PATIENCE, Children
from octavo.io.huggingface import open_model
from octavo.report import speed
from octavo.report.files import number

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = [
    *("int8-dynamic", "int8-group64", "int8-weight-only", "llm-int8", "fp8-dynamic", "fp8-weight-only", "fp8-block"),
    *("e5m2-dynamic", "e3m4-dynamic", "e2m5-dynamic", "e3m4-int8-group64"),
]
WEIGHTS, ROWS = ((576, 576), (576, 1536), (1536, 576), (2048, 2048)), (1, 16, 128, 512)
LARGE = 128  # rows from which on a target holds for every shape
INT8 = ["int8-dynamic"]
NUMBERS = 1 << 24
FORMATS = ("E4M3FN", "E4M3", "E5M2", "E3M4", "E2M5", "INT8")
HEAD = ", head too"
COPY = "copy_"
TORCHAO, TRANSLATE, LLAMA = "torchao int8-dynamic", "ctranslate2 int8", "llama.cpp Q8_0"


@dataclass(frozen=True)
class Target:
    """What is to be reached (or, of ``most``, not exceeded), and what was; None where it could not be measured."""

    what: str
    bound: float
    measured: float | None
    unit: str = "×"
    most: bool = False

    @property
    def verdict(self) -> str:
        """Met or not."""
        if self.measured is None:
            return "not measured"
        met = self.measured <= self.bound if self.most else self.measured >= self.bound
        return "met" if met else "**missed**"

    @property
    def row(self) -> list[str]:
        """Its row in the table."""
        ours = "–" if self.measured is None else f"{self.measured:.2f} {self.unit}"
        return [self.what, f"{'≤' if self.most else '≥'} {self.bound:g} {self.unit}", ours, self.verdict]


@dataclass(frozen=True)
class Section:
    """What a section found: its targets, and its tables as Markdown."""

    targets: list[Target]
    text: str
    timings: list[dict[str, Any]]


def ratio(race: Race, task: str, ours: str, to: str) -> float | None:
    """How many times as fast as another contender; None where one of them could not run."""
    timing = race.find(task, ours)
    return None if timing is None else race.ratio(timing, to)


def section(race: Race, targets: Sequence[Target], roof: roofline.Roofline | None) -> Section:
    """The race's tables, targets beside."""
    roof = None if roof is None else roof.raised(race.timings)
    parts = [] if roof is None else [f"Measured roofline: {roof}."]
    for table in speed.tables(race, roof):
        rows = [[number(cell, table.digits) for cell in row] for row in table.rows]
        parts.append(f"**{table.title}**\n\n{markdown(list(table.columns), rows)}")
    return Section(list(targets), "\n\n".join(parts), race.to_json())


def gemm(arguments: argparse.Namespace) -> Section:
    """Linear layers: everything a layer does, beside the bare integer product ``torch._int_mm``."""
    race, shapes = Race(linear.BASELINE), [linear.Shape(rows, *weight) for weight in WEIGHTS for rows in ROWS]
    with children(arguments) as apart:
        for some in linear.by_weight(shapes).values():
            entered = linear.contenders(some, NAMES) + peers.linear(installed(arguments), some, apart.threads)
            race.run(apart.apart(entered), linear.work(some), arguments.repeats or 11, bar)
    large = [str(one) for one in shapes if one.rows >= LARGE]
    found = [ratio(race, task, "int8-dynamic", linear.RAW) for task in large]
    worst = None if None in found else min(x for x in found if x is not None)
    what = f"int8-dynamic linear, M ≥ {LARGE}, K and N ≥ 576, the slowest of {len(large)} shapes, to torch._int_mm"
    return section(race, [Target(what, 0.8, worst)], roofline.measure())


def model(arguments: argparse.Namespace) -> Section:
    """SmolLM2-135M without compilation: a prompt of 512 tokens, then 32 tokens after 64.

    "head too": the output head in 8 bits, which otherwise stays in 16.
    """
    race = Race(linear.BASELINE)
    opened = open_model("demo").model
    task = language.prompt(opened)
    entered = language.contenders(opened, NAMES, task)
    both = language.contenders(opened, ["int8-dynamic"], task, head=True)
    entered += [replace(one, name=f"{one.name}{HEAD}") for one in both if one.name == "int8-dynamic"]
    race.run(entered, language.work(task), arguments.repeats or 7, bar)

    def target(scheme: str, doing: str, least: float, to: str = linear.BASELINE) -> Target:
        return Target(f"{scheme}, {doing}, to {to}", least, ratio(race, doing, scheme, to))

    prefill, decode = language.PREFILL, language.DECODE
    targets = [
        target("int8-dynamic", prefill, 1.15),
        target("int8-dynamic", decode, 2.0),
        target(f"int8-dynamic{HEAD}", decode, 2.0),
        target("int8-weight-only", prefill, 0.9),
        target("int8-weight-only", decode, 1.8),
        *(target(name, prefill, 0.85) for name in NAMES if name.endswith("-dynamic") and name != "int8-dynamic"),
        target("int8-group64", prefill, 1.0),
        target("int8-group64", decode, 1.5),
        target("llm-int8", prefill, 1 / 1.6, "int8-dynamic"),
        target("llm-int8", decode, 1 / 1.6, "int8-dynamic"),
    ]
    return section(race, targets, roofline.measure())


def others(arguments: argparse.Namespace) -> Section:
    """SmolLM2-135M by the installed peers, not compiled, as above; each in a process of its own."""
    race = Race(linear.BASELINE)
    opened = open_model("demo").model
    task, names = language.prompt(opened), ["int8-dynamic", "int8-weight-only"]
    with tempfile.TemporaryDirectory() as folder, children(arguments) as apart:
        entered = language.contenders(opened, names, task)
        stored = language.Stored.of(opened, Path(folder))
        entered += peers.language(installed(arguments), stored, task, apart.threads)
        race.run(apart.apart(entered), language.work(task), arguments.repeats or 7, bar)
    decode = language.DECODE
    found = ratio(race, decode, "int8-dynamic", TORCHAO)
    return section(race, [Target(f"int8-dynamic, {decode}, to {TORCHAO}", 5.0, found)], None)


def compiled(arguments: argparse.Namespace) -> Section:
    """The same under ``torch.compile``, with a static cache for decoding; "head too": the output head in 8 bits.

    Everyone has a process of its own; they are compiled one after the other, before the first turn. Nothing is compiled
    twice: it is inductor's Python that takes its time, one thread, layer by layer, torchao's longest.
    """
    race = Race(f"{linear.BASELINE}, compiled")
    opened = open_model("demo").model
    task = language.prompt(opened)
    with tempfile.TemporaryDirectory() as folder, children(arguments) as apart:
        stored = language.Stored.of(opened, Path(folder))
        entered = [one for one in language.compiled(stored, INT8, task) if one.unit != "FP32"]
        both = language.compiled(stored, INT8, task, head=True)
        entered += [replace(one, name=f"{one.name}{HEAD}") for one in both if one.name.startswith(INT8[0])]
        them = peers.language(installed(arguments), stored, task, apart.threads, compiled=True)
        entered += [one for one in them if one.name in (f"{TORCHAO}{linear.COMPILED}", TRANSLATE, LLAMA)]
        race.run(apart.apart(entered), language.work(task), arguments.repeats or 7, bar)
    ours, prefill, decode = "int8-dynamic, compiled", language.PREFILL, language.DECODE

    def target(doing: str, least: float, to: str, name: str = ours) -> Target:
        return Target(f"{name}, {doing}, to {to}", least, ratio(race, doing, name, to))

    targets = [
        target(prefill, 1.25, race.baseline),
        target(prefill, 1.0, f"{TORCHAO}, compiled"),
        target(prefill, 1.0, TRANSLATE),
        target(decode, 0.7, LLAMA),
        target(decode, 0.7, LLAMA, ours + HEAD),
    ]
    return section(race, targets, None)


def casts(arguments: argparse.Namespace) -> Section:
    """``cast_`` and ``fake_quantize_``, in place on 16 M float32, beside ``copy_``."""
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    out, doing = torch.empty_like(x), "in place, 16 M float32"

    def way(name: str, run: Callable[[], object]) -> Contender:
        return Contender(name, lambda: {doing: Task(run)})

    race = Race(COPY)
    entered = [way(COPY, lambda: out.copy_(x))]
    for fmt in map(ov.formats.get, FORMATS):
        how = ov.Cast(fmt)
        entered.append(way(f"cast_ to {fmt.name}", lambda fmt=fmt: ov.cast_(out, fmt)))
        entered.append(way(f"fake_quantize_ to {fmt.name}", lambda how=how: ov.fake_quantize_(out, how)))
    race.run(entered, {doing: Work(NUMBERS / 1e9, "billions/s")}, arguments.repeats or 11, bar)
    return section(
        race, [Target(f"{c.name}, to {COPY}", 0.4, ratio(race, doing, c.name, COPY)) for c in entered[1:]], None
    )


def stream(arguments: argparse.Namespace) -> Section:
    """``octavo quantize --stream`` on a sharded checkpoint of 6 GB: see ``benchmarks/streaming.py``."""
    found = streaming.run(arguments.folder, arguments.gigabytes, arguments.repeats or 3)
    targets, rows = [], []
    for name in streaming.SCHEMES:
        told, size = found[name], found[name]["peak_memory_bytes"] / 1e9
        targets.append(Target(f"{name}, to a copy of the files", streaming.LEAST_SPEED, told["ratio_to_copy"]))
        targets.append(Target(f"{name}, peak memory", streaming.MOST_MEMORY / 1e9, size, "GB", most=True))
        rows.append([name, f"{told['megabytes_per_second']:.0f}", f"{told['ratio_to_copy']:.2f}", f"{size:.2f}"])
    table = markdown(["", "MB/s", "to a copy", "peak memory, GB"], rows)
    copy = f"{found['bytes'] / 1e9:.2f} GB; the copy reads {found['copy_megabytes_per_second']:.0f} MB/s."
    return Section(targets, f"{copy}\n\n{table}", [])


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "gemm": gemm,
    "model": model,
    "others": others,
    "compiled": compiled,
    "casts": casts,
    "stream": stream,
}


def installed(arguments: argparse.Namespace) -> list[str]:
    """The peers that are here, unless they are not wanted."""
    return [] if arguments.no_peers else [name for name in peers.FILES if peers.get(name).installed]


def children(arguments: argparse.Namespace) -> Children:
    """Processes for those that need their own."""
    return Children(
        torch.get_num_threads(), arguments.patience, lambda words: print(words, file=sys.stderr, flush=True)
    )


def bar(items: list[Any], label: str) -> Iterable[Any]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import track

    return track(items, label, console=Console(stderr=True), transient=True)


def page(results: dict[str, Any]) -> str:
    """docs/performance.md, from everything that was measured last."""
    parts = [
        "# Performance\n",
        "Made by `python -m benchmarks.performance`. Contenders take turns in one run, and a ratio is the median of",
        "the repeats' ratios; ± is half the distance of the quartiles. Compare ratios: machines differ. *% of roof* is",
        "how near a kernel is to what memory and arithmetic allow here (the roofline of [Williams, Waterman and",
        "Patterson, 2009](https://doi.org/10.1145/1498765.1498785)), measured in the same run. `octavo bench` measures",
        "the same on your machine.\n",
        "## Targets\n",
    ]
    measured = [name for name in SECTIONS if name in results]
    rows = [[f"[{name}](#{name})", *Target(**told).row] for name in measured for told in results[name]["targets"]]
    parts += [markdown(["section", "", "target", "measured", ""], rows), ""]
    for name in measured:
        told, what = results[name], inspect.cleandoc(SECTIONS[name].__doc__ or "").replace("``", "`")
        lines = (what, f"`{told['command']}`", told["machine"], told["text"])
        parts += [f"## {name.capitalize()}", "", *(part for line in lines for part in (line, ""))]
    return "\n".join(parts).rstrip() + "\n"


def about() -> str:
    """On what it was measured, in a line."""
    here = machine.examine(rows=(), repeats=0)
    libraries = [f"{name} {version}" for name in peers.FILES if (version := peers.get(name).version)]
    words = [here.processor, f"{here.threads} threads", f"torch {here.torch}", here.native.partition(",")[0]]
    return f"{'; '.join([*words, *libraries])}."


def main() -> None:
    """Run the named sections, or all, and write docs/: a section is written as soon as it is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--repeats", type=int, help="turns of every contender")
    parser.add_argument("--no-peers", action="store_true", help="without other libraries")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that one may take to get ready")
    parser.add_argument("--folder", help="stream: where there is room for three times the checkpoint")
    parser.add_argument("--gigabytes", type=float, default=6, help="stream: size of the checkpoint")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where to write (default: docs/)")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"there is no section {sorted(unknown)[0]}; there are {', '.join(SECTIONS)}")
    file = arguments.docs / "performance.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.sections or SECTIONS:
        found = SECTIONS[name](arguments)
        command = f"python -m benchmarks.performance {name}"
        results[name] = {"command": command, "machine": about(), **asdict(found)}
        file.write_text(json.dumps(results, indent=1) + "\n")
        (arguments.docs / "performance.md").write_text(page(results))
        for target in found.targets:
            print(f"{name}: {target.what}: {target.measured} (target {target.bound:g}): {target.verdict}")


if __name__ == "__main__":
    main()
