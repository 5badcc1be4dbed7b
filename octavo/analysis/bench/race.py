"""Several ways to do the same things, timed in turns.

No machine is as fast as it was a second ago, so contenders are never timed one after the other. Every repeat runs all
of them once and begins with another, and they are compared within repeats: a ratio is the median of the repeats'
ratios. Short runs are timed several at a time, after one that does not count and a pause in which the threads of the
contender before come to rest.

What cannot run is kept with the reason.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from octavo.calibration.batches import Track
from octavo.errors import OctavoError

SHORT = 5e-3  # seconds: less than this is timed several times in a turn
MOST = 200  # runs in a turn
REST = 2e-3  # seconds between two contenders
REASON = 240  # letters
MODELS = 1024  # compiled side by side


class Timed(Protocol):
    """What takes turns: a task here or in another process."""

    @property
    def flops(self) -> float | None:
        """Operations of one run, where they are known."""

    @property
    def nbytes(self) -> float | None:
        """Bytes that one run must read and write, where they are known."""

    def turn(self) -> float:
        """Run as often as it takes to be timed well: seconds a run."""


@dataclass
class Task:
    """Something to be timed: ``run``; ``before`` goes first, outside the clock.

    ``flops`` and ``nbytes`` are the operations of one run and the bytes it must read and write, where they are known.
    With ``own_clock``, ``run`` gives the seconds itself, because it cannot do without things that do not count.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    flops: float | None = None
    nbytes: float | None = None
    own_clock: bool = False
    _runs: int = field(default=0, init=False, repr=False)

    def turn(self) -> float:
        """Seconds a run; the first turn also finds out how many runs it takes to be long enough."""
        with torch.inference_mode(), redirect_stdout(sys.stderr):
            if not self._runs:
                self._clock(1)
                seconds = max(self._clock(1), SHORT / MOST)
                self._runs = 1 if self.before else max(1, min(MOST, math.ceil(SHORT / seconds)))
            elif self._runs > 1:
                self.run()
            return self._clock(self._runs)

    def _clock(self, runs: int) -> float:
        if self.before is not None:
            self.before()
        if self.own_clock:
            return float(statistics.fmean(float(self.run()) for _ in range(runs)))  # type: ignore[arg-type]
        started = _now()
        for _ in range(runs):
            self.run()
        return (_now() - started) / runs


@dataclass(frozen=True)
class Work:
    """What one run of a task gets done: so many of something, whose rate is called ``unit``."""

    amount: float
    unit: str


@dataclass(frozen=True)
class Contender:
    """A way to do some tasks: ``prepare`` quantizes, compiles or converts, and gives what is timed, by task.

    ``unit`` says which arithmetic bounds it: "INT8", "BF16" or "FP32"; empty where that is not known. ``home`` names
    the process it ought to have, with others of that name (see ``worker``); its ``prepare`` is picklable then.
    """

    name: str
    prepare: Callable[[], Mapping[str, Timed]]
    unit: str = ""
    home: str = ""


@dataclass
class Timing:
    """How long one contender took for one task: seconds a run, one number a repeat; or the reason why there is none."""

    task: str
    contender: str
    work: Work
    unit: str = ""
    flops: float | None = None
    nbytes: float | None = None
    seconds: list[float] = field(default_factory=list)
    reason: str = ""

    @property
    def median(self) -> float | None:
        """Seconds a run."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half the distance of the quartiles, as a part of the median."""
        if not self.seconds:
            return None
        lower, median, upper = quartiles(self.seconds)
        return (upper - lower) / 2 / median

    @property
    def rate(self) -> float | None:
        """Work a second, in the work's unit."""
        return self.work.amount / self.median if self.median else None

    def ratios(self, base: "Timing") -> list[float]:
        """How many times as fast as ``base``, repeat by repeat."""
        return [theirs / ours for ours, theirs in zip(self.seconds, base.seconds, strict=False)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


class Race:
    """Timings, in the order of their tasks; complete at any moment for what was run so far."""

    def __init__(self, baseline: str) -> None:
        self.baseline = baseline
        self.timings: list[Timing] = []

    def run(
        self,
        contenders: Sequence[Contender],
        tasks: Mapping[str, Work],
        repeats: int,
        track: Track = lambda items, label: items,
        label: str = "measuring",
    ) -> None:
        """Prepare all, warm up, and take ``repeats`` turns. The timings gain one for every task and contender."""
        if repeats < 1:
            raise OctavoError(f"{repeats} repeats measure nothing; at least 1 is needed")
        names = [contender.name for contender in contenders]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OctavoError(f"two contenders are called {sorted(twice)[0]!r}")
        made = {(t, c.name): Timing(t, c.name, work, c.unit) for t, work in tasks.items() for c in contenders}
        self.timings += made.values()
        lanes = [
            _Lane(timing, task)
            for contender in track(list(contenders), f"{label}: preparing")
            for timing, task in _prepared(contender, [made[t, contender.name] for t in tasks])
        ]
        turns = [(turn, place) for turn in range(repeats) for place in range(len(lanes))]
        for turn, place in track(turns, label):
            lanes[(turn * _stride(len(lanes)) + place) % len(lanes)].take()

    @property
    def tasks(self) -> list[str]:
        """All tasks, in order."""
        return list(dict.fromkeys(timing.task for timing in self.timings))

    def of(self, task: str) -> list[Timing]:
        """The timings of one task."""
        return [timing for timing in self.timings if timing.task == task]

    def find(self, task: str, contender: str) -> Timing | None:
        """The timing of a task by a contender."""
        return next((t for t in self.of(task) if t.contender == contender), None)

    def ratio(self, timing: Timing, to: str | None = None) -> float | None:
        """How many times as fast as the baseline, or as another contender: the median over the repeats."""
        base = self.find(timing.task, self.baseline if to is None else to)
        ratios = [] if base is None else timing.ratios(base)
        return statistics.median(ratios) if ratios else None

    def to_json(self) -> list[dict[str, Any]]:
        """A record a timing, with every repeat's seconds and what follows from them."""
        return [
            {
                "task": t.task,
                "contender": t.contender,
                "reason": t.reason or None,
                "seconds": t.seconds,
                "median": t.median,
                "spread": t.spread,
                "rate": t.rate,
                "rate_unit": t.work.unit,
                "ratio": self.ratio(t),
                "arithmetic": t.unit or None,
                "flops": t.flops,
                "nbytes": t.nbytes,
            }
            for t in self.timings
        ]


class _Lane:
    """One task of one contender while the race lasts."""

    def __init__(self, timing: Timing, task: Timed) -> None:
        self.timing, self.task = timing, task

    def take(self) -> None:
        """One turn."""
        if self.timing.reason:
            return
        try:
            time.sleep(REST)
            self.timing.seconds.append(self.task.turn())
        except Exception as error:
            self.timing.seconds.clear()
            self.timing.reason = reason(error)


def _prepared(contender: Contender, timings: Sequence[Timing]) -> list[tuple[Timing, Timed]]:
    """The contender's tasks beside their timings; a timing without a task gets the reason."""
    try:
        with torch.no_grad(), redirect_stdout(sys.stderr):
            tasks = contender.prepare()
    except Exception as error:
        for timing in timings:
            timing.reason = reason(error)
        return []
    found = []
    for timing in timings:
        task = tasks.get(timing.task)
        if task is None:
            timing.reason = "does not do this"
            continue
        timing.flops, timing.nbytes = task.flops, task.nbytes
        found.append((timing, task))
    return found


@contextmanager
def compiling() -> Iterator[None]:
    """For races with compiled contenders: torch compiles eight models of a class and runs the others uncompiled.

    Here it goes on, and one that it cannot compile is an error.
    """
    import torch._dynamo.config as settings

    more = {"recompile_limit": MODELS, "accumulated_recompile_limit": MODELS, "fail_on_recompile_limit_hit": True}
    with settings.patch(more):
        yield


def reason(error: BaseException) -> str:
    """Why something could not run, in one short line."""
    words = " ".join(str(error).split()) or "no message"
    text = words if isinstance(error, OctavoError) else f"{type(error).__name__}: {words}"
    return text if len(text) <= REASON else text[: REASON - 1] + "…"


def _stride(lanes: int) -> int:
    """By how many places the order turns from repeat to repeat: about a third, so that neighbours change ends."""
    return max(1, lanes // 3)


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
