"""Graphcore's FP8-CSCALE: one exponent bias for every weight and input, and the window of biases that works.

"Training and inference of large language models using 8-bit floating point" (2309.17224) scales the whole model by one
constant, ``2**bias``, and finds that a window of biases keeps 99.5 % of the accuracy, which narrows as models grow.
Below the window numbers fall under the format's smallest, above it they saturate.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from octavo.calibration.batches import Track
from octavo.core import formats
from octavo.core.formats import Format
from octavo.core.schemes import constant
from octavo.errors import OctavoError
from octavo.ptq.quantize import quantize_


@dataclass(frozen=True)
class BiasWindow:
    """The score at every bias, that of the float model, and the longest run of biases that keep ``keep`` of it."""

    format: str
    float_score: float
    keep: float
    scores: dict[int, float]
    window: tuple[int, ...]

    @property
    def bias(self) -> int:
        """The bias to take: the middle of the window. Raises ``OctavoError`` if there is none."""
        if not self.window:
            best = max(self.scores, key=lambda bias: self.scores[bias])
            raise OctavoError(
                f"no bias keeps {self.keep:.1%} of {self.float_score:g} in {self.format}; the best is {best} with "
                f"{self.scores[best]:g}. Try a format with a wider range, or scales per tensor"
            )
        return self.window[len(self.window) // 2]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return asdict(self)


def bias_window(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    fmt: Format | str = formats.E4M3FNUZ,
    biases: Sequence[int] = range(-6, 13),
    keep: float = 0.995,
    *,
    track: Track | None = None,
) -> BiasWindow:
    """Quantize a copy of the model with each bias and score it.

    ``score``: higher is better and positive, such as an accuracy, or 1 / perplexity. A score that is NaN counts as 0.
    Raises ``OctavoError`` if the float model's score is not positive and finite, or no bias is given.
    """
    biases = sorted(set(biases))
    if not biases:
        raise OctavoError("there is no bias to try; pass some, such as range(-6, 13)")
    if not 0 < keep <= 1:
        raise OctavoError(f"keep is the share of the float score to keep, within (0, 1], not {keep}")
    base = float(score(model))
    if not (math.isfinite(base) and base > 0):
        raise OctavoError(f"the float model's score is {base}; it must be positive, and higher for better models")
    scores: dict[int, float] = {}
    for bias in track(biases, "trying biases") if track else biases:
        twin = copy.deepcopy(model)
        quantize_(twin, constant(fmt, bias))
        found = float(score(twin))
        scores[bias] = 0.0 if math.isnan(found) else found
    return BiasWindow(formats.get(fmt).name, base, keep, scores, _longest(scores, keep * base))


def _longest(scores: dict[int, float], least: float) -> tuple[int, ...]:
    """The longest run of neighbouring biases whose score is at least that; the later of two equal ones."""
    best: tuple[int, ...] = ()
    run: tuple[int, ...] = ()
    for bias, score in scores.items():
        run = ((*run, bias) if run and run[-1] == bias - 1 else (bias,)) if score >= least else ()
        best = run if len(run) >= len(best) else best
    return best
