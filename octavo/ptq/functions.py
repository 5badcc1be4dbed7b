"""Parts of a graph that work number by number: clamps, and functions of one tensor.

A clamp costs nothing where something before it rounds, for that clamps anyway. And a function of one number, however
many operators it is written with (``x * torch.sigmoid(x)``), is one table of codes.
"""

import math
import operator
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.moves import MOVES
from octavo.ptq.export import bound, operator_name, sizes

FINEST = 1 / 256  # of what a sum counts in: codes finer than that show nothing more
CLAMPS = ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")
FUNCTIONS = ("hardswish", "log_sigmoid")  # without torch's tag for what works number by number
COMMUTING = {"reshape", "flatten", "unflatten", "max_pool1d", "max_pool2d", "max_pool3d", *MOVES} - {"pad"}


@dataclass(frozen=True)
class Limits:
    """Where clamps leave a tensor."""

    low: float = -math.inf
    high: float = math.inf

    def then(self, other: "Limits") -> "Limits":
        """Both, one after the other."""
        low, high = (min(max(end, other.low), other.high) for end in (self.low, self.high))
        return Limits(low, high)

    def on(self, observed: Encoding | None, unit: float) -> Encoding:
        """The encoding of a tensor so limited: as its range asks for, but not much finer than its sums count."""
        assert observed is not None
        return observed.coarser(unit * FINEST).limited(self.low, self.high)


def limits_of(node: fx.Node) -> Limits | None:
    """What an operator clamps to, if it does nothing else."""
    name = operator_name(node)
    if name not in CLAMPS:
        return None
    given = list(bound(node).values())[1:]
    low, high = {"relu": (0, None), "relu6": (0, 6), "clamp_max": (None, *given)}.get(name, (*given, None)[:2])
    if any(isinstance(end, fx.Node) for end in (low, high)):
        return None
    return Limits(-math.inf if low is None else float(low), math.inf if high is None else float(high))


def raise_limits(graph: fx.Graph, rounding: Container[str]) -> None:
    """Let clamps change places with max pools and moves before them, so that what rounds can take them over."""
    for node in list(graph.nodes):
        if limits_of(node) is None:
            continue
        top = first = node.args[0]
        while operator_name(first) in COMMUTING and len(first.users) == 1:
            below, first = first, first.args[0]
        if first is top or len(first.users) > 1 or operator_name(_producer(first)) not in rounding:
            continue
        with graph.inserting_after(first):
            clamp = graph.create_node("call_function", node.target, (first, *node.args[1:]), node.kwargs)
        clamp.meta = {**node.meta, "val": first.meta["val"]}
        below.replace_input_with(first, clamp)
        node.replace_all_uses_with(top)
        graph.erase_node(node)


def functions(graph: fx.Graph, constants: Mapping[fx.Node, Any], rounding: Container[str]) -> dict[fx.Node, fx.Node]:
    """The nodes that are a function of one tensor's numbers, each with that tensor's node.

    The function may differ along one dimension, by constants. Clamps that something before them takes over are none.
    """
    roots: dict[fx.Node, fx.Node] = {}
    varying: dict[fx.Node, set[int]] = {}
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in constants or not _by_number(node):
            continue
        operands = [x for x in node.all_input_nodes if x not in constants]
        before = operands[0]
        rounds = before in taken or (operator_name(_producer(before)) in rounding and before not in roots)
        if limits_of(node) is not None and rounds and len(before.users) == 1:
            taken.add(node)
            continue
        found = {roots.get(x, x) for x in operands}
        dims = {dim for x in operands for dim in varying.get(x, ())}
        for constant in (constants[x] for x in node.all_input_nodes if x in constants):
            shape = constant.shape if isinstance(constant, Tensor) else ()
            dims |= {dim for dim, n in enumerate(shape, -len(shape)) if n != 1}
        if len(found) != 1 or len(dims) > 1:
            continue
        root = found.pop()
        if isinstance(root.meta["val"], Tensor) and sizes(root) == sizes(node):
            roots[node], varying[node] = root, dims
    return roots


def _producer(node: fx.Node) -> fx.Node:
    """The operator itself where a node is one of its several results."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source


def _by_number(node: fx.Node) -> bool:
    """Whether the operator makes one tensor, number by number, the same way each time."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    known = torch.Tag.pointwise in target.tags or operator_name(node) in FUNCTIONS
    return known and isinstance(node.meta.get("val"), Tensor)
