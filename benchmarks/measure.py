"""Time several ways to do one thing, interleaved, so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

WARM = 5  # rounds before the first that counts: fresh memory makes the first few several times as long


class Timing(NamedTuple):
    """Seconds: the median of all rounds, and the quartiles as a measure of how far to trust it."""

    median: float
    lower: float
    upper: float

    @property
    def spread(self) -> str:
        """Half the distance of the quartiles, in percent of the median."""
        return f"± {50 * (self.upper - self.lower) / self.median:.0f} %"


def timed(ways: Mapping[str, Callable[[], object]], repeats: int = 9, warm: int = WARM) -> dict[str, Timing]:
    """The time of each way over ``repeats`` rounds, after ``warm`` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-warm, repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    found = {}
    for name, times in seconds.items():
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        found[name] = Timing(median, lower, upper)
    return found


def interleaved(ways: Mapping[str, Callable[[], object]], repeats: int = 9, warm: int = WARM) -> dict[str, float]:
    """Median seconds of each way, as ``timed`` finds them."""
    return {name: timing.median for name, timing in timed(ways, repeats, warm).items()}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
