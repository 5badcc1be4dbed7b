"""What each engine can run: the formats that its kernels know, and which layers it runs as one.

Three things decide: what the layout that the engine reads can say (``io.compressed_tensors``), which kernels the engine
has, and what the hardware multiplies (``support.json``, with sources). Times can only be measured here. For another
engine they are estimated from the word in ``support.json``: a native format multiplies twice as many numbers a second
as 16 bits, a converted one as many (and reads half the bytes), an emulated one half as many.

Smoothing asks nothing of an engine: its scales go into the norms and weights that are there anyway. So wherever an
engine multiplies INT8 inputs with one scale a token or a tensor, which suffer most from outliers, it is a candidate
with two α: 0.7 is better behind most norms, 0.5 where massive activations are as large as ``down_proj``'s.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from octavo.analysis import support
from octavo.analysis.comparison import Candidate
from octavo.core import formats, schemes
from octavo.core.cast import Cast
from octavo.core.granularity import PerChannel, PerTensor
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.io import compressed_tensors
from octavo.nn.swap import Layer

#: A scale for every 32 numbers on both sides: what llama.cpp calls Q8_0.
Q8_0 = schemes.dynamic(formats.INT8, weight_group=32, input_group=32)
#: Inputs from 0 to 255 with a zero point, one scale for all of them, made as they come: ONNX's DynamicQuantizeLinear.
ONNX_DYNAMIC = Scheme(Cast(formats.INT8, PerChannel(0)), Cast(formats.UINT8, PerTensor(), affine=True))
#: How long a format takes where support.json has one of its words for it, 16 bits taking 1.
SECONDS = {"native": 0.5, "convert": 0.95, "emulated": 2.0}
ALPHAS = (0.7, 0.5)


@dataclass(frozen=True)
class Engine:
    """What runs the model later.

    ``row``: its name in support.json (None: this machine, measured). ``candidates``: what is worth trying;
    ``layout``: whether it reads compressed-tensors; ``stacked``: whether it runs q, k and v, and gate and up, as one
    layer with one scheme.
    """

    name: str
    row: str | None
    candidates: tuple[Candidate, ...]
    kernels: tuple[Scheme, ...] | None = None
    layout: Literal["compressed-tensors", "any"] = "any"
    stacked: bool = False
    hardware: str | None = None

    def on(self, hardware: str | None) -> "Engine":
        """The engine on some piece of hardware, by a part of its name in ``octavo formats --support``."""
        if hardware is None:
            return self
        if self.row is None:
            raise OctavoError("what runs here is measured here; hardware is for other engines, such as vllm")
        names = [row.name for row in support.load().hardware.rows]
        found = [name for name in names if hardware.lower() in name.lower()]
        if not found:
            near = difflib.get_close_matches(hardware, names, n=2, cutoff=0.2)
            raise OctavoError(f"no hardware is called {hardware!r}; there are {', '.join(near or names)}")
        return replace(self, hardware=found[0])

    def obstacle(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why the engine does not run the layer under this scheme, or None."""
        if self.layout == "compressed-tensors" and (why := compressed_tensors.obstacle_for(layer.module, scheme)):
            return why
        if self.kernels is not None and scheme not in self.kernels:
            return f"{self.name} has no kernel for {schemes.describe(scheme)}"
        word = self._hardware_word(scheme)
        if word in ("none", "emulated") and scheme.input is not None:
            return f"{self.hardware} does not multiply {scheme.input.format.name}"
        return None

    def rate(self, scheme: Scheme | None) -> float | None:
        """How long a layer takes, 16 bits taking 1; None where it can be measured."""
        if self.row is None:
            return None
        if scheme is None:
            return 1.0
        rows = {row.name: row for row in support.load().software.rows}
        return SECONDS.get(rows[self.row].cells[_column(scheme)].status, 1.0)

    def _hardware_word(self, scheme: Scheme) -> str | None:
        if self.hardware is None or scheme.input is None:
            return None
        cells = next(row for row in support.load().hardware.rows if row.name == self.hardware).cells
        column = scheme.input.format.name.lower()
        return cells[column if column in cells else "int8" if "int8" in column else "other"].status


def _column(scheme: Scheme) -> str:
    """The software table's column for a scheme."""
    integers = isinstance(scheme.weight.format, formats.IntegerFormat)
    if scheme.input is None:
        return "int8w" if integers else "e4m3w"
    if scheme == schemes.FP8_BLOCK:
        return "block"
    return "int8" if integers else "e5m2" if scheme.weight.format is formats.E5M2 else "e4m3fn"


def _named(*names: str) -> tuple[Scheme, ...]:
    return tuple(schemes.get(name) for name in names)


def _candidates(*of: Scheme, smoothed: Sequence[Scheme] = ()) -> tuple[Candidate, ...]:
    """Each scheme by itself, and some of them smoothed as well."""
    return (*map(Candidate, of), *(Candidate(scheme, alpha) for scheme in smoothed for alpha in ALPHAS))


#: Per-channel weights and per-token inputs in the two formats that today's matrix units multiply.
FAST = _named("int8-dynamic", "fp8-dynamic")
_INT8 = FAST[:1]
_HERE = _named(
    *("int8-dynamic", "fp8-dynamic", "e3m4-dynamic", "e2m5-dynamic", "e5m2-dynamic", "int8-group64"),
    *("e3m4-int8-group64", "llm-int8", "int8-weight-only"),
)
_BLOCKS = _named("int8-dynamic", "fp8-dynamic", "fp8-block", "int8-weight-only", "fp8-weight-only")
_ONNX = (ONNX_DYNAMIC, *_named("int8-static", "int8-affine-static", "int8-weight-only"))
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "here",
            None,
            _candidates(*_HERE, schemes.dynamic(formats.INT8, weight_group=32, input_group=32), smoothed=_INT8),
        ),
        Engine("vllm", "vLLM", _candidates(*_BLOCKS, smoothed=_INT8), _BLOCKS, "compressed-tensors", stacked=True),
        Engine(
            "transformers",
            "transformers",
            _candidates(*_BLOCKS, *_named("int8-group64"), smoothed=_INT8),
            layout="compressed-tensors",
        ),
        Engine("onnx", "ONNX Runtime", _candidates(*_ONNX, smoothed=_ONNX[:2]), _ONNX),
        Engine("llama.cpp", "llama.cpp", _candidates(Q8_0), (Q8_0,)),
    )
}


def runnable(engine: Engine, layers: Sequence[Layer], wanted: Iterable[Candidate]) -> list[Candidate]:
    """Those candidates that the engine runs in some layer. Raises ``OctavoError`` if there is none."""
    found, why = [], "there is no scheme to choose from"
    for candidate in wanted:
        scheme = candidate.scheme
        if scheme is None:
            continue
        reasons = [(x.name, x.refusal(scheme) or engine.obstacle(x, scheme)) for x in layers]
        if all(reason for _, reason in reasons):
            why = ": ".join(map(str, reasons[0])) if reasons else why
        else:
            found.append(candidate)
    if not found:
        raise OctavoError(f"{engine.name} runs none of the candidates in any layer: {why}")
    return found


def get(name: str) -> Engine:
    """The engine of that name."""
    if name not in ENGINES:
        raise OctavoError(f"no engine is called {name!r}; there are {', '.join(ENGINES)}")
    return ENGINES[name]
