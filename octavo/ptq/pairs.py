"""Pairs of layers between which a scale can move: what makes a channel, and the linear layers that read it.

Where a channel is made it is divided by a number, and the weights that read it are multiplied by the same: the function
stays as it is, if everything that reads the channel takes part. Two kinds of makers can do that:

- a norm, or any module with a weight a channel that its result is proportional to, such as Gemma's ``1 + weight``;
- a linear layer behind which every step keeps each channel's proportions: an ``up_proj`` that is multiplied by the
  gate on its way to ``down_proj``, or a layer before a ReLU.

They are found in a trace of the model, never by names of classes, and what a module does is tried on numbers.
"""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octavo.calibration.batches import Call
from octavo.nn import swap
from octavo.nn.linear import QuantizedLinear
from octavo.nn.trace import Step, Trace, is_atom, sharing, trace

#: Operators that move, copy, mix or choose tokens, or multiply each number by another: a channel stays a channel.
PROPORTIONAL = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "alias", "clone", "detach", "contiguous", "_to_copy"),
        *("unsqueeze", "squeeze", "transpose", "permute", "t", "expand", "repeat", "slice", "select", "split"),
        *("index", "index_select", "gather", "mean", "sum", "neg", "mul", "mul_", "div", "div_", "relu", "relu_"),
    )
)


@dataclass(frozen=True)
class Pair:
    """A module that makes channels, by name, and all linear layers that read them.

    ``kind``: a ``norm``, which multiplies by ``weight + plus``, or a ``linear`` layer, whose rows the channels are.
    """

    source: str
    readers: tuple[str, ...]
    kind: Literal["norm", "linear"]
    plus: float = 0.0

    def __str__(self) -> str:
        return f"{self.source} → {', '.join(self.readers)}"


def find(model: nn.Module, example: Any, call: Call | None = None) -> tuple[list[Pair], dict[str, str]]:
    """All pairs in the order in which they run, and for every linear layer that is in none, by name, why not.

    The model runs once on ``example``, a batch as for calibration (``call`` as there).
    """
    search = _Search(model, trace(model, example, call))
    for step in search.flow.steps:
        if step.kind == "module":
            search.try_source(step)
    return search.pairs, search.left()


class _Unfit(Exception):
    """Why a module cannot be the source of a pair."""


class _Search:
    """One model, its trace, and what has been found in it so far."""

    def __init__(self, model: nn.Module, flow: Trace) -> None:
        self.model, self.flow = model, flow
        self.layers = {x.name: x for x in swap.layers(model) if _is_linear(x)}
        self.order = {step: number for number, step in enumerate(flow.steps)}
        self.runs = Counter(step.name for step in flow.steps if step.kind == "module")
        self.pairs: list[Pair] = []
        self.reasons: dict[str, dict[str, str]] = {}  # of a reader: source → why they are no pair
        self.proportional: dict[str, bool] = {}

    def try_source(self, step: Step) -> None:
        """Note the pair that starts at this step, or at its readers why there is none."""
        module = self.model.get_submodule(step.name)
        linear = self.layers.get(step.name)
        if linear is None and not _looks_like_norm(module):
            return
        readers, obstacle = self._follow(step)
        taken = {name for pair in self.pairs for name in pair.readers}
        try:
            if obstacle:
                raise _Unfit(obstacle)
            if not readers:
                return
            if both := taken & {x.name for x in readers}:
                raise _Unfit(f"the input of {min(both)} is scaled elsewhere already")
            self._check(step, module, linear, readers)
            if linear is None:
                self.pairs.append(Pair(step.name, tuple(x.name for x in readers), "norm", _plus(step.name, module)))
            else:
                self.pairs.append(Pair(step.name, tuple(x.name for x in readers), "linear"))
        except _Unfit as why:
            for reader in readers:
                self.reasons.setdefault(reader.name, {})[step.name] = str(why)

    def left(self) -> dict[str, str]:
        """Why linear layers are in no pair."""
        taken = {name for pair in self.pairs for name in pair.readers}
        return {name: self._reason(name) for name in self.layers if name not in taken}

    def _reason(self, name: str) -> str:
        if found := self.reasons.get(name):
            return "; ".join(dict.fromkeys(found.values()))
        runs = self.flow.runs(name)
        if not runs:
            return "the example does not reach it"
        inputs = runs[0].inputs
        while len(inputs) == 1 and inputs[0].kind == "function" and inputs[0].name in PROPORTIONAL:
            if len(inputs[0].inputs) != 1:
                break
            inputs = inputs[0].inputs
        if not inputs:
            return "it reads an input of the model"
        return f"its input comes from the {' and the '.join(map(self._described, inputs))}"

    def _described(self, step: Step) -> str:
        if step.kind != "module":
            return str(step)
        return f"{step}, {_a(self.model.get_submodule(step.name))}"

    def _follow(self, start: Step) -> tuple[list[Step], str | None]:
        """The linear layers behind a step, through what keeps the proportions of channels; or what else it goes to."""
        readers: list[Step] = []
        others: list[Step] = []
        queue = [start]
        passed = {start}  # what the scale goes through
        while queue:
            for reader in queue.pop().readers:
                if reader in passed or reader in readers or reader in others:
                    continue
                if reader.kind == "module" and reader.name in self.layers:
                    readers.append(reader)
                elif self._keeps_proportions(reader):
                    passed.add(reader)
                    queue.append(reader)
                else:
                    others.append(reader)
        others += [step for step in passed if sum(x in passed for x in step.reads) > 1]  # a square, say
        obstacle = f"the result of {start.name} also goes to the {self._described(others[0])}" if others else None
        return sorted(readers, key=self.order.__getitem__), obstacle

    def _keeps_proportions(self, step: Step) -> bool:
        if step.kind == "function":
            return step.name in PROPORTIONAL
        if step.kind != "module":
            return False
        if step.name not in self.proportional:
            self.proportional[step.name] = _is_proportional(self.model.get_submodule(step.name))
        return self.proportional[step.name]

    def _check(self, step: Step, module: nn.Module, linear: swap.Layer | None, readers: list[Step]) -> None:
        """Raise ``_Unfit`` unless source and readers can take the scale, and nobody else looks at their weights."""
        if linear is not None and linear.obstacle is not None:
            raise _Unfit(f"{step.name}: {linear.obstacle}")
        width = step.shape[-1] if step.shape else None
        for reader in readers:
            layer = self.layers[reader.name]
            if layer.obstacle is not None:
                raise _Unfit(f"{reader.name}: {layer.obstacle}")
            if layer.matrix.shape[1] != width:
                raise _Unfit(f"{step.name} makes {width} channels, but {reader.name} reads {layer.matrix.shape[1]}")
            if len(reader.inputs) != 1:
                raise _Unfit(f"{reader.name} reads more than the result of {step.name}")
        for one in (step, *readers):
            part = self.model.get_submodule(one.name)
            if self.runs[one.name] != 1:
                raise _Unfit(f"{one.name} runs {self.runs[one.name]} times in a pass")
            if (one is step and part._forward_hooks) or (one is not step and part._forward_pre_hooks):
                raise _Unfit(f"a hook stands between {step.name} and {readers[0].name}")
            if (one is not step or linear is not None) and "weight" not in part._parameters:
                raise _Unfit(f"the weight of {one.name} is computed; make it permanent first")
            if (why := sharing(self.model, self.flow, one)) is not None:
                raise _Unfit(why)
        self._check_reached(step, readers, width)

    def _check_reached(self, step: Step, readers: list[Step], width: int | None) -> None:
        """That no layer near by, such as another expert, may read the same when other data comes."""
        parts = [name.split(".") for name in (step.name, *(reader.name for reader in readers))]
        common = [level[0] for level in _while_equal(parts)]
        for name, layer in self.layers.items():
            unreached = self.runs[name] == 0 and name.split(".")[: len(common)] == common
            if unreached and layer.obstacle is None and layer.matrix.shape[1] == width:
                raise _Unfit(f"the example does not reach {name}, which may read the result of {step.name} too")


def _is_linear(layer: swap.Layer) -> bool:
    if isinstance(layer.module, QuantizedLinear):
        return True
    return swap.eight_bit(layer.module) is QuantizedLinear


def _looks_like_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    weight = own.get("weight")
    return is_atom(module) and weight is not None and weight.ndim == 1 and set(own) <= {"weight", "bias"}


@torch.no_grad()
def _plus(name: str, module: nn.Module) -> float:
    """What the module adds to its weight before its result is proportional to it, tried on made-up numbers."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    twin = copy.deepcopy(module).to_empty(device="cpu") if _on_meta(module) else copy.deepcopy(module).to("cpu")
    twin = twin.double().eval()
    width = len(twin.get_parameter("weight"))
    weight, bias, scale = numbers(width), numbers(width), numbers(width)
    x = 4 * numbers(3, width) - 4

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        for parameter, values in (("weight", weight), ("bias", bias)):
            if twin._parameters.get(parameter) is not None:
                twin.get_parameter(parameter).copy_(values)
        y = twin.forward(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise _Unfit(f"{name}, {_a(module)}, makes something else than one number for each that it reads")
        return y

    try:
        before = run(weight, bias)
        for plus in (0.0, 1.0):
            after = run((weight + plus) * scale - plus, bias * scale)
            if torch.allclose(after.double(), before.double() * scale, rtol=1e-4, atol=1e-5):  # they compute in float32
                return plus
    except _Unfit:
        raise
    except Exception as error:  # it wants something else than rows
        raise _Unfit(f"{name}, {_a(module)}, cannot be tried: {type(error).__name__}: {error}") from error
    raise _Unfit(f"the result of {name}, {_a(module)}, is not proportional to its weight")


@torch.no_grad()
def _is_proportional(module: nn.Module) -> bool:
    """Whether a module without parameters multiplies its result by whatever positive number its input is."""
    if not is_atom(module) or [*module.parameters(), *module.buffers()]:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=generator, dtype=torch.float64) * torch.tensor([[1e-3], [1], [30], [1e4]]).double()
    try:
        twin = copy.deepcopy(module).eval()
        y = twin.forward(x.clone())
        large = torch.rand(64, generator=generator, dtype=torch.float64) * 30
        scaled = twin.forward(x * large)
    except Exception:  # it wants something else
        return False
    same = isinstance(y, Tensor) and y.shape == x.shape
    return same and torch.allclose(scaled, y * large, rtol=1e-6, atol=0) and bool(y.any())


def _on_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _while_equal(parts: list[list[str]]) -> list[tuple[str, ...]]:
    """The levels of dotted names, from the top, at which all of them agree."""
    levels = list(zip(*parts, strict=False))
    until = next((n for n, level in enumerate(levels) if len(set(level)) > 1), len(levels))
    return levels[:until]


def _a(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
