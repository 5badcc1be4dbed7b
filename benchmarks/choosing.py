"""What choosing a scheme for every layer wins on the demo model, and how long comparing them takes.

``python -m benchmarks.choosing [--comparison FILE] [--only N]`` writes docs/choosing.md and docs/choosing.json.
Python's own documentation is dealt out into three parts that share no paragraph: one to calibrate on, one to compare
and search on, one to judge by. With ``--comparison`` cells that were measured before are read from the file, else they
are kept there; with ``--only`` one question is asked again, and the other answers stay.

Two comparisons are made. The first, of the five schemes that ``compare`` takes by itself, is the one whose time counts;
the second is of smoothed INT8 and E4M3, and both together are what the searches start from.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import octavo as ov
from benchmarks.measure import markdown
from octavo.analysis import compare as comparing
from octavo.analysis.choice import Choice, Objective
from octavo.analysis.choose import choose
from octavo.analysis.comparison import Candidate, Comparison
from octavo.core import schemes
from octavo.io import text
from octavo.io.huggingface import open_model
from octavo.ptq.rules import rules_to_json

DOCS = Path(__file__).resolve().parent.parent / "docs"
INT8, E4M3, WEIGHT_ONLY = "int8-dynamic", "fp8-dynamic", "int8-weight-only"


def _smoothed(name: str, *alphas: float) -> tuple[Candidate, ...]:
    return tuple(Candidate(schemes.get(name), alpha) for alpha in alphas)


SMOOTHED = (*_smoothed(INT8, 0.5, 0.6, 0.7, 0.8), *_smoothed(E4M3, 0.5))
SMOOTHED_WEIGHTS = _smoothed(WEIGHT_ONLY, 0.5, 0.7)  # for weights beside smoothed INT8 layers
FAST = (INT8, E4M3, *SMOOTHED)
EVERY = (*(name for name in comparing.SCHEMES if schemes.get(name).input is not None), *SMOOTHED)
CELLS, LENGTH, SEARCH, CALIBRATION, JUDGED = 160, 512, 13, 4, 16


@dataclass(frozen=True)
class Question:
    """What is asked for: the candidates, the search's budget, and by how many percent the perplexity may rise.

    The budget is less than the limit: what 13 windows say is uncertain by some 0.18 % with INT8's noise.

    ``most``: the share of weights that may be left as they are, or keep inputs as they are.
    """

    title: str
    candidates: tuple[Any, ...]
    budget: float
    limit: float
    rounding: bool = False
    objective: Objective = "time"
    most: float = 0.0


QUESTIONS = (
    Question("all 8-bit formats, every layer in 8 bits", EVERY, 0.0029, 0.3),
    Question("INT8 a channel and a token, or E4M3, every layer in 8 bits", FAST, 0.0064, 1.0, True),
    Question(
        "the same, with as few weights as can be left as they are", (*FAST, None), 0.0041, 0.3, True, "bytes", 0.1
    ),
    Question(
        "the same, all weights in 8 bits, but some layers with inputs as they are (W8A16)",
        (*FAST, WEIGHT_ONLY, *SMOOTHED_WEIGHTS),
        0.0029,
        0.3,
        most=0.1,
    ),
)


@dataclass(frozen=True)
class Judged:
    """By how many percent the perplexity rises, give or take ``error``, and what was not wholly quantized.

    ``left``, ``inputs``: the shares of the quantizable weights that stayed as they are, and whose inputs did.
    """

    rise: float
    error: float
    left: float
    inputs: float

    @property
    def said(self) -> str:
        """The rise in words."""
        return f"{self.rise:+.2f} ± {self.error:.2f} %"


class Demo:
    """The demo model and the three parts of the text."""

    def __init__(self) -> None:
        source = open_model("demo")
        self.model = source.model
        half, judged = text.split(text.read_text(None))
        calibration, search = text.split(half)
        tokenizer = source.tokenizer
        self.judged = text.windows(tokenizer, judged, 512, JUDGED)
        rows = text.windows(tokenizer, search, LENGTH, SEARCH)
        self.search = [{"input_ids": rows[:1, :CELLS]}, *({"input_ids": row[None]} for row in rows[1:])]
        self.calibration = [{"input_ids": row[None]} for row in text.windows(tokenizer, calibration, 512, CALIBRATION)]
        self.each = [math.log(ov.perplexity(self.model, window[None]).value) for window in self.judged]
        self.base = math.exp(mean(self.each))

    def judge(self, rules: Any) -> Judged:
        """The model quantized by rules, on text that took no part."""
        twin = copy.deepcopy(self.model)
        by_data = not isinstance(rules, str) and any(r.smooth is not None or r.rounding != "nearest" for r in rules)
        ov.quantize_(twin, rules, self.calibration if by_data else None)
        sizes = {layer.name: layer.weight.numel() for layer in comparing.quantizable(self.model)}
        made = {name: getattr(twin.get_submodule(name), "scheme", None) for name in sizes}

        def share(names: Iterable[str]) -> float:
            return sum(sizes[name] for name in names) / sum(sizes.values())

        # a window at a time: what differs between windows, but not between models, cancels
        each = [math.log(ov.perplexity(twin, window[None]).value) for window in self.judged]
        rises = [after - before for after, before in zip(each, self.each, strict=True)]
        return Judged(
            rise=100 * math.expm1(mean(rises)),
            error=100 * stdev(rises) / math.sqrt(len(rises)),
            left=share(name for name, scheme in made.items() if scheme is None),
            inputs=share(name for name, scheme in made.items() if scheme is not None and scheme.input is None),
        )


def compared(demo: Demo, file: Path | None) -> Comparison:
    """All cells, with the seconds that the five schemes' took; or what the file holds of earlier ones."""
    if file is not None and file.exists():
        return Comparison.from_json(json.loads(file.read_text()))

    def cells(of: Sequence[Any], whole: bool = False) -> Comparison:
        given: dict[str, Any] = {"calibration": demo.calibration, "cells_on": 1, "whole": whole, "name": "demo"}
        return ov.compare(demo.model, demo.search, of, **given)

    five = cells(comparing.SCHEMES, whole=True)  # benchmarks.page shows whole models beside the mix
    print(f"comparing: {five.seconds['cells']:.0f} s", flush=True)
    found = joined(five, cells((*SMOOTHED, *SMOOTHED_WEIGHTS)))
    if file is not None:
        file.write_text(json.dumps(found.to_json()))
    return found


def joined(first: Comparison, second: Comparison) -> Comparison:
    """The first comparison with the other's candidates as well."""
    known = set(first.candidates)
    new = tuple(candidate for candidate in second.candidates if candidate not in known)
    names = {candidate.name for candidate in new}
    cells = tuple(cell for cell in second.cells if cell.candidate in names)
    return replace(first, candidates=first.candidates + new, cells=first.cells + cells)


def answer(demo: Demo, question: Question, comparison: Comparison) -> dict[str, Any]:
    """A choice, and what it costs on text that took no part."""
    started = time.perf_counter()
    choice: Choice = choose(
        demo.model,
        demo.search,
        question.budget,
        candidates=question.candidates,
        calibration=demo.calibration,
        comparison=comparison,
        rounding=question.rounding,
        objective=question.objective,
    )
    seconds = time.perf_counter() - started
    judged = demo.judge(choice.rules)
    shares = f"{100 * judged.left:.1f} % left, {100 * judged.inputs:.1f} % with inputs left"
    print(f"{question.title}: {judged.said}, {shares}, {seconds:.0f} s; {choice.verdict}", flush=True)
    return {
        "question": question.title,
        "limit": question.limit,
        **asdict(judged),
        "said": judged.said,
        "seconds": seconds,
        "verdict": choice.verdict,
        "rules": rules_to_json(choice.rules),
        "choice": choice.to_json(),
    }


def main() -> None:
    """Compare, choose, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparison", type=Path, metavar="FILE")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="ask these; what was answered before stays")
    arguments = parser.parse_args()
    demo = Demo()
    comparison = compared(demo, arguments.comparison)
    known = json.loads((DOCS / "choosing.json").read_text()) if arguments.only else {"plain": {}, "answers": []}
    plain = {name: Judged(**judged) for name, judged in known["plain"].items()}
    plain = plain or {name: demo.judge(name) for name in (INT8, E4M3, "e3m4-int8-group64")}
    for name, judged in plain.items():
        print(f"{name}: {judged.said}", flush=True)
    answers = {a["question"]: a for a in known["answers"]}
    for number, question in enumerate(QUESTIONS, 1):
        if not arguments.only or number in arguments.only:
            answers[question.title] = answer(demo, question, comparison)
            write(demo, comparison, plain, answers)  # what is known is kept, should the next be interrupted


def write(
    demo: Demo, comparison: Comparison, plain: Mapping[str, Judged], answers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Both files."""
    rows = [[f"`{name}` everywhere", judged.said, "0 %", "0 %", "", "", ""] for name, judged in plain.items()]
    asked = [question for question in QUESTIONS if question.title in answers]
    for question in asked:
        a = answers[question.title]
        shares = [f"{100 * a[key]:.1f} %" for key in ("left", "inputs")]
        limit = f"{question.limit} %" + (f", {100 * question.most:.0f} % left" if question.most else "")
        kept = a["rise"] <= question.limit and a["left"] + a["inputs"] <= question.most
        rows.append([question.title, a["said"], *shares, limit, "yes" if kept else "**no**", f"{a['seconds']:.0f}"])
    cells = len(comparing.SCHEMES) * len(comparison.layers)
    header = [
        "what was asked for",
        "perplexity",
        "weights left",
        "inputs left",
        "wanted",
        "reached",
        "seconds to choose",
    ]
    lines = [
        "# Choosing a scheme for every layer",
        "",
        "Made by `python -m benchmarks.choosing`; the rules and every step of the searches are in choosing.json. "
        f"SmolLM2-135M-Instruct on Python's documentation: {JUDGED} windows of 512 tokens, none of which took part in "
        f"comparing, calibrating or searching; float32 has a perplexity of {demo.base:.3f}.",
        "",
        "Perplexity: its rise, and the standard error of that. Weights left: the share of the linear layers' weights "
        "that are not in 8 bits at all. Inputs left: the share whose weights are in 8 bits and whose inputs are not.",
        "",
        markdown(header, rows),
        "",
        f"Comparing five schemes took {comparison.seconds['cells']:.0f} s for {cells} cells, each with {CELLS} tokens "
        f"({comparison.machine}; wanted: less than 600 s on two cores).",
        "",
        *(f"- **{question.title}**: {answers[question.title]['verdict']}" for question in asked),
        *(f"- **{question.title}**: not measured." for question in QUESTIONS if question not in asked),
        "",
    ]
    (DOCS / "choosing.md").write_text("\n".join(lines))
    told = {"float": demo.base, "plain": {name: asdict(judged) for name, judged in plain.items()}}
    told |= {"answers": [answers[question.title] for question in asked], "seconds": comparison.seconds, "cells": cells}
    (DOCS / "choosing.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
