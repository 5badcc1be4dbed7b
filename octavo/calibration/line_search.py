"""Qualcomm's search for the format itself: how many of the bits to spend on the mantissa, and where to clip.

Kuzmin et al., "FP8 Quantization: The Power of the Exponent" (2208.09225). For every split of the bits and every clip on
a grid of 111 from 0.1 to 1.2 times the largest magnitude, the squared error; each range (each channel of a weight)
votes for the mantissa bits that serve it best, the majority decides for all, and each then takes its best clip in
that format. Moving the clip is moving the bias: what the paper calls a real-valued bias is a format with a scale.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from octavo.calibration.histogram import Histogram, HistogramObserver
from octavo.calibration.mse import squared_error
from octavo.core import formats
from octavo.core.cast import Cast
from octavo.core.formats import FLOAT32_MAX, FloatFormat, IntegerFormat
from octavo.errors import OctavoError

Mode = Literal["fully-flexible", "flexible-bias", "fixed"]
CLIPS = torch.linspace(0.1, 1.2, 111, dtype=torch.float64)  # times the largest magnitude


@dataclass(eq=False)
class LineSearch(HistogramObserver):
    """The paper's three modes.

    ``"fully-flexible"`` looks for mantissa bits and bias: ``settle`` gives the Cast with the format.
    ``"flexible-bias"`` looks for the bias of the Cast's own format.
    ``"fixed"`` takes format and bias as they are: the scale is 1.

    The formats are the paper's, of as many bits as the Cast's: a sign, at least one mantissa bit, an exponent with the
    bias 2**(exponent − 1), subnormals, and no infinities or NaN.
    """

    mode: Mode = "fully-flexible"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise OctavoError(f"the modes of the line search are {', '.join(get_args(Mode))}, not {self.mode!r}")

    def check(self, how: Cast) -> None:
        """The fully flexible mode chooses among floats."""
        if self.mode == "fully-flexible" and isinstance(how.format, IntegerFormat):
            raise OctavoError(
                f"the fully flexible line search chooses among floats, but {how.format.name} is an integer format; "
                "start from a float format such as E4M3, or keep it: LineSearch('flexible-bias')"
            )

    def settle(self, how: Cast) -> Cast:
        """The Cast with the format that most ranges are best served by; all-zero ones do not vote."""
        self.check(how)
        if self.mode != "fully-flexible" or how.format.bits < 3:  # two bits hold no mantissa
            return how
        self._check_seen(how)
        family = [replace(how, format=fmt) for fmt in splits(how.format.bits)]
        votes = torch.zeros(len(family), dtype=torch.int64)
        for seen in self.histogram.parts():
            errors = torch.stack([_errors(seen, one)[1].amin(0) for one in family]).argmin(0)
            some = torch.maximum(-seen.low, seen.high) > 0
            votes += errors[some].bincount(minlength=len(family)).cpu()
        return family[int(votes.argmax())] if votes.any() else how

    def _rule(self, seen: Histogram, how: Cast) -> tuple[Tensor, Tensor]:
        if self.mode == "fixed":
            first, last = how.format.min, how.format.max
            if not how.affine and how.format.signed:  # the lowest code of an integer is not used
                last = min(last, -first)
                first = -last
            return torch.full_like(seen.low, first), torch.full_like(seen.high, last)
        clips, errors = _errors(seen, how)
        low, high = _ends(seen, clips.gather(0, errors.argmin(0, keepdim=True)).squeeze(0), how)
        return low.clamp(min=-FLOAT32_MAX), high.clamp(max=FLOAT32_MAX)


def splits(bits: int) -> list[FloatFormat]:
    """The float formats of so many bits, sign included, from one mantissa bit up; from the catalogue where they are."""
    found = []
    for mantissa in range(max(1, bits - 9), bits - 1):
        exponent = bits - 1 - mantissa
        fmt = formats.float_format(exponent, mantissa, 2 ** (exponent - 1), "none")
        known = (f for f in formats.CATALOGUE if isinstance(f, FloatFormat) and replace(f, name=fmt.name) == fmt)
        found.append(next(known, fmt))
    return found


def _errors(seen: Histogram, how: Cast) -> tuple[Tensor, Tensor]:
    """The grid of clips and what each loses, [111, rows]."""
    values, counts, unit = seen.points()
    clips = CLIPS.to(unit.device)[:, None] * torch.maximum(-seen.low, seen.high)
    low, high = _ends(seen, clips, how)
    return clips, squared_error(values, counts, low / unit, high / unit, how)


def _ends(seen: Histogram, clip: Tensor, how: Cast) -> tuple[Tensor, Tensor]:
    """The range for a clip: an affine one ends where the data does if that is nearer."""
    return (torch.maximum(-clip, seen.low), torch.minimum(clip, seen.high)) if how.affine else (-clip, clip)
