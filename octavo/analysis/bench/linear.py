"""Linear layers of one size by every scheme, float type and library: x [M, K] times W [N, K].

A model never finds a layer's weight in the cache, because it has just read the others. So every contender owns as many
copies of the layer as no cache holds, and takes them in turn.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.analysis.bench import roofline
from octavo.analysis.bench.race import Contender, Task, Work
from octavo.core import schemes
from octavo.core.formats import IntegerFormat
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.ptq.quantize import model_bytes, quantize_
from octavo.ptq.rules import Rule

BASELINE = "BF16"
RAW = "torch._int_mm"
COMPILED = ", compiled"  # ends the names of contenders that go through torch.compile
OURS_COMPILED = f"octavo{COMPILED}"
MOST_COPIES = 64
#: A layer made ready: given x [M, K] in BF16, it returns what computes the product.
Bind = Callable[[Tensor], Callable[[], object]]


@dataclass(frozen=True)
class Shape:
    """A product [rows, inner] × [inner, columns], written MxKxN."""

    rows: int
    inner: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.inner}x{self.columns}"

    @property
    def weight(self) -> tuple[int, int]:
        """[N, K], as ``torch.nn.Linear`` keeps it."""
        return self.columns, self.inner

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.rows * self.inner * self.columns


def shape(text: str) -> Shape:
    """The shape written ``512x576x1536``. Raises ``OctavoError``."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise OctavoError(f"a shape is rows x inner x columns, as 512x2048x2048, not {text!r}")
    return Shape(*map(int, parts))


def by_weight(shapes: Sequence[Shape]) -> dict[tuple[int, int], list[Shape]]:
    """The shapes that share a weight's size, without repetitions."""
    found: dict[tuple[int, int], list[Shape]] = {}
    for one in dict.fromkeys(shapes):
        found.setdefault(one.weight, []).append(one)
    return found


def work(shapes: Sequence[Shape]) -> dict[str, Work]:
    """What is done, by task."""
    return {str(one): Work(one.flops / 1e9, "GFLOP/s") for one in shapes}


def unit(scheme: Scheme) -> str:
    """The arithmetic that bounds a scheme: integers on integers run in INT8, everything else of 8 bits as BF16."""
    sides = [scheme.weight] if scheme.input is None else [scheme.weight, scheme.input]
    if max(how.format.bits for how in sides) > 8:
        return "FP32"
    integers = all(isinstance(how.format, IntegerFormat) for how in sides)
    return "INT8" if integers and scheme.input is not None else "BF16"


def contenders(
    shapes: Sequence[Shape], names: Sequence[str], device: str = "cpu", compiled: bool = False, seed: int = 0
) -> list[Contender]:
    """FP32, BF16, torch's bare integer product and every scheme, for shapes that share a weight."""
    weight, inputs = numbers(shapes, device, seed)
    count = copies(weight)
    made = [
        Contender("FP32", lambda: _float(weight.float(), inputs, count), "FP32"),
        Contender(BASELINE, lambda: _float(weight, inputs, count), "BF16"),
        Contender(RAW, lambda: _raw(weight, inputs, count), "INT8"),
    ]
    for name in names:
        scheme = schemes.get(name)
        made.append(Contender(name, partial(_scheme, weight, inputs, count, scheme), unit(scheme)))
        if compiled:
            prepare = partial(_compiled, list(shapes), device, seed, count, scheme)
            made.append(Contender(f"{name}{COMPILED}", prepare, unit(scheme), OURS_COMPILED))
    return made


def numbers(shapes: Sequence[Shape], device: str = "cpu", seed: int = 0) -> tuple[Tensor, dict[Shape, Tensor]]:
    """A weight [N, K] and an input [M, K] a shape, normal numbers in BF16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).bfloat16().to(device)

    weight = normal(*shapes[0].weight) / math.sqrt(shapes[0].inner)
    return weight, {one: normal(one.rows, one.inner) for one in shapes}


def copies(weight: Tensor) -> int:
    """How many layers of 8-bit codes are twice what the cache holds."""
    return min(MOST_COPIES, 1 + 2 * roofline.cache_size() // max(1, weight.numel()))


def tasks(inputs: Mapping[Shape, Tensor], layers: Sequence[Bind], nbytes: float | None) -> dict[str, Task]:
    """A task a shape: the layers in turn, each with the shape's input; ``nbytes`` is what one layer holds."""
    return {str(one): _task(one, x, layers, nbytes) for one, x in inputs.items()}


def _task(one: Shape, x: Tensor, layers: Sequence[Bind], nbytes: float | None) -> Task:
    turn = itertools.cycle([layer(x) for layer in layers])
    moved = None if nbytes is None else nbytes + 2.0 * one.rows * (one.inner + one.columns)
    return Task(lambda: next(turn)(), flops=one.flops, nbytes=moved)


def _float(weight: Tensor, inputs: Mapping[Shape, Tensor], count: int) -> dict[str, Task]:
    def bind(x: Tensor, own: Tensor) -> Callable[[], object]:
        x = x.to(own.dtype)
        return lambda: F.linear(x, own)

    layers = [_with(bind, weight.clone()) for _ in range(count)]
    return tasks(inputs, layers, weight.nbytes)


def _raw(weight: Tensor, inputs: Mapping[Shape, Tensor], count: int) -> dict[str, Task]:
    def bind(x: Tensor, own: Tensor) -> Callable[[], object]:
        codes = (x * 20).clamp(-127, 127).to(torch.int8)
        return lambda: torch._int_mm(codes, own.t())

    layers = [_with(bind, torch.ones_like(weight, dtype=torch.int8)) for _ in range(count)]
    return tasks(inputs, layers, weight.numel())


def _compiled(shapes: Sequence[Shape], device: str, seed: int, count: int, scheme: Scheme) -> dict[str, Task]:
    return _scheme(*numbers(shapes, device, seed), count, scheme, compiled=True)


def _scheme(
    weight: Tensor, inputs: Mapping[Shape, Tensor], count: int, scheme: Scheme, compiled: bool = False
) -> dict[str, Task]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(linear).eval()
    quantize_(model, [Rule(scheme)], list(inputs.values()) if scheme.static else None)

    def bind(x: Tensor, own: Any) -> Callable[[], object]:
        return lambda: own(x)

    modules: list[Any] = [copy.deepcopy(model[0]) for _ in range(count)]
    if compiled:
        modules = [torch.compile(module, dynamic=False) for module in modules]
    return tasks(inputs, [_with(bind, module) for module in modules], model_bytes(model))


def _with(bind: Callable[[Tensor, Any], Callable[[], object]], own: Any) -> Bind:
    return lambda x: bind(x, own)
