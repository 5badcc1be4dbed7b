"""How one layer runs in 8 bits (``Scheme``), and the schemes of the field as constants.

A constant or its name is accepted wherever a scheme is. ``dynamic`` and ``weight_only`` build the same with any formats
and any groups.
"""

import difflib
import math
from dataclasses import dataclass, replace

from octavo.core import formats
from octavo.core.cast import Cast
from octavo.core.formats import Format
from octavo.core.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.scaling import Constant, Current, Static
from octavo.errors import OctavoError


@dataclass(frozen=True)
class Scheme:
    """One layer at inference: how its weight [out, in] and input […, in] are cast; ``input=None`` is weight-only.

    One of the two has at most 8 bits, the other at most 16. A ``Static`` input scale is found by calibration.
    ``outliers`` is LLM.int8()'s threshold (2208.07339): input columns that hold a larger magnitude are taken out and
    multiplied in the model's own dtype, see ``nn/outliers.py``.
    """

    weight: Cast
    input: Cast | None = None
    outliers: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Cast):
            raise OctavoError("a scheme quantizes the weight; to leave a layer alone its rule says None")
        for how in (self.weight, self.input):
            if isinstance(how, Cast) and not how.format.signed and not how.affine:
                raise OctavoError(f"{how.format.name} drops negative numbers; give its Cast affine=True, or use INT8")
        bits = [how.format.bits for how in (self.weight, self.input) if how is not None]
        if min(bits) > 8 or max(bits) > 16:
            names = " and ".join(how.format.name for how in (self.weight, self.input) if how is not None)
            raise OctavoError(f"a scheme has at most 8 bits on one side and 16 on the other, not {names}")
        if isinstance(self.weight.scale, Static):
            raise OctavoError(
                "a weight's scale comes from the weight itself; Static is for inputs, Current for weights"
            )
        if self.input is not None and self.static and self.input.granularity != PerTensor():
            raise OctavoError(f"a static input has one scale for all of it, not {self.input.granularity}")
        if self.outliers is not None:
            self._check_outliers(self.outliers)

    def _check_outliers(self, threshold: float) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < math.inf:
            raise OctavoError(f"outliers is the magnitude above which a column is taken out, not {threshold!r}")
        if self.input is None:
            raise OctavoError("outliers are taken out of inputs in 8 bits; this scheme leaves inputs in float")
        if not isinstance(self.input.scale, Current):
            raise OctavoError("outliers are taken out of each input as it comes; its scale must be Current, not fixed")
        object.__setattr__(self, "outliers", float(threshold))

    @property
    def static(self) -> bool:
        """Whether the input's scale is found by calibration."""
        return self.input is not None and isinstance(self.input.scale, Static)


def dynamic(
    weight: Format | str,
    input: Format | str | None = None,
    weight_group: int | None = None,
    input_group: int | None = None,
) -> Scheme:
    """Weights with a scale a channel, inputs with a scale a token, made as they come; or with groups along both.

    ``input`` defaults to the weight's format.
    """
    rows = PerGroup(weight_group) if weight_group is not None else PerChannel(0)
    tokens = PerGroup(input_group) if input_group is not None else PerToken()
    weight_format = formats.get(weight)
    return Scheme(Cast(weight_format, rows), Cast(weight_format if input is None else formats.get(input), tokens))


def weight_only(weight: Format | str, group: int | None = None) -> Scheme:
    """8-bit weights with a scale a channel (or a group); the arithmetic stays in the model's dtype."""
    return replace(dynamic(weight, weight_group=group), input=None)


def static(
    weight: Format | str,
    input: Format | str | None = None,
    affine: bool = False,
    power_of_two: bool = False,
    weight_group: int | None = None,
) -> Scheme:
    """Weights with a scale a channel (or a group), inputs with one scale, found by calibration.

    ``input`` defaults to the weight's format. ``affine`` gives integer inputs a zero point; ``power_of_two`` makes
    all scales powers of two.
    """
    base = weight_only(weight, weight_group).weight
    scale = Current(power_of_two=True) if power_of_two else Current()
    how = Cast(formats.get(weight if input is None else input), PerTensor(), Static(power_of_two), affine=affine)
    return Scheme(replace(base, scale=scale), how)


def constant(fmt: Format | str, bias: int) -> Scheme:
    """One exponent bias for every weight and input: everything is multiplied by ``2**bias`` and cast, nothing measured.

    Graphcore's FP8-CSCALE (2309.17224).
    """
    how = Cast(formats.get(fmt), PerTensor(), Constant(2.0**-bias))
    return Scheme(how, how)


INT8_DYNAMIC = dynamic(formats.INT8)
FP8_DYNAMIC = dynamic(formats.E4M3FN)
INT8_WEIGHT_ONLY = weight_only(formats.INT8)
FP8_WEIGHT_ONLY = weight_only(formats.E4M3FN)
#: DeepSeek-V3 (2412.19437): weights in tiles of 128 × 128, inputs in stretches of 128.
FP8_BLOCK = Scheme(Cast(formats.E4M3FN, PerBlock(128, 128)), Cast(formats.E4M3FN, PerGroup(128)))
#: The accurate ones: the same bits with a scale for every 64 numbers.
INT8_GROUP64 = dynamic(formats.INT8, weight_group=64, input_group=64)
E3M4_INT8_GROUP64 = dynamic(formats.INT8, formats.E3M4, weight_group=64, input_group=64)
INT8_STATIC = static(formats.INT8)
#: INT8, but input columns with any magnitude above 6 in 16 bits: LLM.int8() (2208.07339).
LLM_INT8 = replace(INT8_DYNAMIC, outliers=6.0)
#: SmoothQuant's own (2211.10438, table 2), one scale a weight; inputs with one a token, one alone, one calibrated.
SMOOTHQUANT_O1 = replace(INT8_DYNAMIC, weight=Cast(formats.INT8))
SMOOTHQUANT_O2 = Scheme(Cast(formats.INT8), Cast(formats.INT8))
SMOOTHQUANT_O3 = Scheme(Cast(formats.INT8), INT8_STATIC.input)
#: Inputs from 0 to 255 with a zero point: twice as fine after a ReLU or a GELU.
INT8_AFFINE_STATIC = static(formats.INT8, formats.UINT8, affine=True)
FP8_STATIC = static(formats.E4M3FN)
FP8_CSCALE = constant(formats.E4M3FNUZ, 2)
#: 8-bit weights with 16-bit integer inputs, and the reverse, as Qualcomm's engines run them (2303.17951).
W8A16 = dynamic(formats.INT8, formats.INT16)
W16A8 = dynamic(formats.INT16, formats.INT8)

NAMES: dict[str, Scheme] = {
    "int8-dynamic": INT8_DYNAMIC,
    "fp8-dynamic": FP8_DYNAMIC,
    "int8-weight-only": INT8_WEIGHT_ONLY,
    "fp8-weight-only": FP8_WEIGHT_ONLY,
    "fp8-block": FP8_BLOCK,
    "int8-group64": INT8_GROUP64,
    "e3m4-int8-group64": E3M4_INT8_GROUP64,
    "llm-int8": LLM_INT8,
    "smoothquant-o1": SMOOTHQUANT_O1,
    "smoothquant-o2": SMOOTHQUANT_O2,
    "smoothquant-o3": SMOOTHQUANT_O3,
    "int8-static": INT8_STATIC,
    "int8-affine-static": INT8_AFFINE_STATIC,
    "fp8-static": FP8_STATIC,
    "fp8-cscale": FP8_CSCALE,
    "w8a16": W8A16,
    "w16a8": W16A8,
    **{f"{f.name.lower()}-dynamic": dynamic(f) for f in (formats.E5M2, formats.E3M4, formats.E2M5)},
    **{f"{f.name.lower()}-weight-only": weight_only(f) for f in (formats.E5M2, formats.E3M4, formats.E2M5)},
    **{f"{f.name.lower()}-static": static(f) for f in (formats.E5M2, formats.E3M4, formats.E2M5)},
}


def get(scheme: Scheme | str) -> Scheme:
    """The scheme of that name (any case, ``-`` or ``_``), or the scheme itself."""
    if isinstance(scheme, Scheme):
        return scheme
    key = str(scheme).lower().replace("_", "-").strip()
    if key not in NAMES:
        near = difflib.get_close_matches(key, NAMES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise OctavoError(f"no scheme is called {scheme!r}; {hint}There are: {', '.join(NAMES)}")
    return NAMES[key]


def alpha(name: str) -> float | None:
    """How far a rule smooths its layers that gives this name and no α of its own: SmoothQuant's ½, or not at all."""
    return 0.5 if str(name).lower().replace("_", "-").strip().startswith("smoothquant") else None


def describe(scheme: Scheme) -> str:
    """The scheme in a few words for a table: its name if it has one, else formats and granularities."""
    for name, known in NAMES.items():
        if known == scheme:
            return name

    def side(how: Cast) -> str:
        parts = [how.format.name]
        if isinstance(how.granularity, PerGroup):
            parts.append(f"g{how.granularity.size}")
        elif isinstance(how.granularity, PerBlock):
            parts.append(f"{how.granularity.rows}×{how.granularity.cols}")
        elif not isinstance(how.granularity, PerChannel | PerToken):
            parts.append("tensor")
        match how.scale:
            case Static():
                parts.append("static")
            case Constant(value):
                parts.append(f"scale {value:g}")
        if getattr(how.scale, "power_of_two", False):
            parts.append("power of two")
        if how.affine:
            parts.append("affine")
        return "/".join(parts)

    taken = "" if scheme.outliers is None else f", outliers above {scheme.outliers:g} in float"
    return f"{side(scheme.weight)} × {side(scheme.input) if scheme.input else 'float'}{taken}"
