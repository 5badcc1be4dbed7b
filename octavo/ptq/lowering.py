"""Every operator of an exported graph as one on codes, or an error that names it.

- A BatchNorm behind a layer is folded into its weights, a ReLU behind anything that rounds becomes its limits.
- Linear layers and convolutions get symmetric weights, a scale an output channel, and int32 biases.
- Sums, products, concatenations, means and adaptive average pools bring their inputs to a scale of their own.
- Average pools, as in TensorFlow Lite, and whatever only chooses, moves or copies numbers keep their input's scale.
- Any function of one number (sigmoid, GELU, a BatchNorm that stands alone, …) becomes a table of its codes.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from octavo.core.cast import Cast, quantize_scaled
from octavo.core.formats import Format, IntegerFormat
from octavo.core.granularity import PerChannel, expand_blocks
from octavo.core.scaling import Current, Static, compute_scale
from octavo.errors import OctavoError
from octavo.nn.integer.elementwise import Add, Clamp, Concatenate, Constant, Lookup, Multiply
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.model import Input, IntegerModel
from octavo.nn.integer.moves import MOVES, Move, Pad, Reshape
from octavo.nn.integer.op import IntegerOp
from octavo.nn.integer.pools import AdaptiveAveragePool, AdaptiveMaxPool, AveragePool, Maximum, MaxPool, Mean
from octavo.nn.integer.sums import Convolution, Linear
from octavo.ptq.export import Exported, bound, operator_name, sizes, where
from octavo.ptq.functions import CLAMPS, Limits, functions, limits_of, raise_limits

LARGEST_BIAS = 1 << 30  # leaves the other half of int32 to the products
#: Makes an operation from the encodings of its inputs and the encoding that its calibrated range asks for, if any.
Build = Callable[[list[Encoding], Encoding | None], IntegerOp]


@dataclass(frozen=True)
class _Step:
    """One operation to be: its name, the tensors it takes, the node whose range its output should span, if its own."""

    name: str
    takes: list[int]
    build: Build
    observed: fx.Node | None


class Plan:
    """What becomes of every node of an exported graph, found before any data is seen.

    Raises ``OctavoError`` for a node that cannot run on integers, with its name and line.
    """

    def __init__(self, exported: Exported, others: dict[str, Any], weight: Cast, activation: Cast) -> None:
        self.exported, self.others, self.weight, self.activation = exported, others, weight, activation
        self.tensors: dict[fx.Node, int] = {}  # those that will be codes, by number
        self.constants: dict[fx.Node, Any] = dict(exported.state)
        self.absorbed: set[fx.Node] = set()  # those that became part of the operation before them
        self.steps: list[_Step] = []
        for node in exported.inputs.values():
            self.tensors[node] = len(self.tensors)
        self.given = len(self.tensors)
        self.shapes = _shapes(exported.inputs)
        graph = exported.module.graph
        raise_limits(graph, _ROUNDING)
        for node in graph.nodes:
            self._fold(node)
        self.roots = functions(graph, self.constants, _ROUNDING)
        for node in graph.nodes:
            if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor | tuple | list):
                self._lower(node)
        self.result = self._numbered(exported.result)

    @property
    def observed(self) -> list[fx.Node]:
        """The nodes whose ranges are needed."""
        return [*self.exported.inputs.values(), *(step.observed for step in self.steps if step.observed is not None)]

    def build(self, ranges: dict[fx.Node, Encoding]) -> IntegerModel:
        """The model, given the encoding that each observed node's range asks for."""
        inputs = [Input(name, ranges[node], self.shapes[name]) for name, node in self.exported.inputs.items()]
        encodings = [x.encoding for x in inputs]
        operations = []
        for step in self.steps:
            observed = None if step.observed is None else ranges[step.observed]
            try:
                operation = step.build([encodings[i] for i in step.takes], observed)
            except OctavoError as error:
                raise OctavoError(f"{step.name}: {error}") from error
            operations.append(operation)
            encodings.append(operation.output)
        names, wiring = [step.name for step in self.steps], [step.takes for step in self.steps]
        device = next(iter(self.exported.state.values()), torch.empty(0)).device
        return IntegerModel(inputs, operations, wiring, names, self.result).eval().to(device)

    # --- following the graph

    def _fold(self, node: fx.Node) -> None:
        """What does not depend on the inputs is computed at once."""
        if node in self.tensors or node in self.constants:
            return
        if node.op == "placeholder":
            self.constants[node] = self.others.get(str(node.target), node.meta.get("val"))
        elif node.op == "get_attr":
            self.constants[node] = operator.attrgetter(str(node.target))(self.exported.module)
        elif node.op == "call_function" and all(x in self.constants for x in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise OctavoError(f"{where(node)} makes random numbers, which integer-only inference has not")
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.constants.__getitem__)
            self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _lower(self, node: fx.Node) -> None:
        if any(node in known for known in (self.constants, self.tensors, self.absorbed)):
            return
        if not any(x in self.tensors or x in self.absorbed for x in node.all_input_nodes):
            raise OctavoError(f"{where(node)} is made of the input's size, which codes do not show")
        name = operator_name(node)
        handler = _HANDLERS.get(name)
        if node in self.roots:
            self._function(node)
        elif handler is not None:
            handler(self, node)
        elif name in MOVES:
            self._move(node)
        else:
            raise _unsupported(node)

    def _plan(
        self, node: fx.Node, last: fx.Node, takes: Sequence[fx.Node | int], build: Build, observed: bool = True
    ) -> None:
        """One more operation: it starts with ``node``, and what it gives is ``last``'s."""
        numbers = [self.tensors[x] if isinstance(x, fx.Node) else x for x in takes]
        self.tensors[last] = self.given + len(self.steps)
        self.steps.append(_Step(where(node), numbers, build, last if observed else None))

    def _keep(self, node: fx.Node, x: fx.Node, build: Callable[[list[Encoding], Encoding], IntegerOp]) -> None:
        """One more operation whose output has its input's encoding."""
        self._plan(node, node, [x], lambda inputs, _: build(inputs, inputs[0]), observed=False)

    def _numbered(self, result: Any) -> Any:
        """The model's result with tensors' numbers for places in the graph's output."""
        if isinstance(result, dict):
            return {key: self._numbered(part) for key, part in result.items()}
        if isinstance(result, list | tuple):
            return type(result)(map(self._numbered, result))
        node = self.exported.outputs[result]
        if node is None or node in self.tensors:
            return None if node is None else self.tensors[node]
        raise OctavoError("the model returns something that does not depend on its input; leave it out")

    def _value(self, node: fx.Node, x: Any, what: str) -> Any:
        """An argument that must not depend on the data."""
        if isinstance(x, fx.Node):
            if x not in self.constants:
                raise OctavoError(f"{where(node)}: its {what} depends on the input; on integers it must be known ahead")
            return self.constants[x]
        if isinstance(x, list | tuple):
            return [self._value(node, part, what) for part in x]
        return x

    # --- what stands behind an operation and becomes part of it

    def _limits(self, last: fx.Node) -> tuple[fx.Node, "Limits"]:
        """The last of the clamps that alone read ``last``, and what they leave."""
        limits = Limits()
        while len(last.users) == 1:
            user = next(iter(last.users))
            found = limits_of(user)
            if found is None:
                break
            self.absorbed.add(user)
            last, limits = user, limits.then(found)
        return last, limits

    def _norm(self, last: fx.Node) -> tuple[fx.Node, Tensor, Tensor] | None:
        """The BatchNorm that alone reads ``last``: its result, and what it multiplies by and adds."""
        user = next(iter(last.users)) if len(last.users) == 1 else None
        if user is None or operator_name(user) not in _NORMS:
            return None
        result = _first_result(user)
        self.absorbed |= {user, result}
        return result, *self._norm_terms(user)

    def _norm_terms(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        given = {name: self._value(node, x, name) for name, x in bound(node).items() if name != "input"}
        if given.get("training") or given["running_mean"] is None:
            raise OctavoError(
                f"{where(node)} takes its statistics from each batch, which has no place on integers; train it with "
                "track_running_stats"
            )
        mean, variance = given["running_mean"].double(), given["running_var"].double()
        factor = (variance + given["eps"]).rsqrt()
        factor = factor if given["weight"] is None else factor * given["weight"].double()
        term = -mean * factor
        return factor, term if given["bias"] is None else term + given["bias"].double()

    # --- operations

    def _linear(self, node: fx.Node) -> None:
        given = bound(node)
        weight = self._value(node, given["weight"], "weight")
        self._weighted(node, Linear, given["input"], weight, self._value(node, given["bias"], "bias"))

    def _matmul(self, node: fx.Node) -> None:
        x, other = list(bound(node).values())[:2]
        if x not in self.tensors or len(sizes(other)) != 2:
            raise OctavoError(
                f"{where(node)}: a product of matrices runs on integers if the second is a weight [in, out]"
            )
        self._weighted(node, Linear, x, self._value(node, other, "second matrix").mT, None)

    def _addmm(self, node: fx.Node) -> None:
        given = bound(node)
        if given["beta"] != 1 or given["alpha"] != 1 or given["mat1"] not in self.tensors:
            raise _unsupported(node)
        bias = self._value(node, given["self"], "bias")
        weight = self._value(node, given["mat2"], "second matrix").mT
        self._weighted(node, Linear, given["mat1"], weight, bias.expand(weight.shape[0]))

    def _convolution(self, node: fx.Node) -> None:
        given = bound(node)
        x, weight = given["input"], self._value(node, given["weight"], "weight")
        size = weight.shape[2:]
        dims, groups = len(size), given["groups"]
        if len(sizes(x)) != dims + 2:
            raise OctavoError(f"{where(node)} takes one image without a batch; give it a batch of one")
        stride, dilation = (_each(given[name], dims) for name in ("stride", "dilation"))
        spans = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
        padding = given["padding"]
        if isinstance(padding, str):
            sides = [(n // 2, n - n // 2) if padding == "same" else (0, 0) for n in spans]
        else:
            sides = [(n, n) for n in _each(padding, dims)]
        spread = [1] * dims
        if "transpose" in operator_name(node) or given.get("transposed"):
            extra = _each(given["output_padding"], dims)
            each = zip(spans, sides, extra, strict=True)
            sides = [(span - before, span - after + more) for span, (before, after), more in each]
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(*range(2, dims + 2))
            stride, spread = [1] * dims, stride
        settings = {"stride": stride, "padding": tuple(sides), "dilation": dilation, "groups": groups, "spread": spread}
        self._weighted(node, Convolution, x, weight, self._value(node, given["bias"], "bias"), **settings)

    def _weighted(
        self,
        node: fx.Node,
        kind: type[Linear | Convolution],
        x: fx.Node,
        weight: Tensor,
        bias: Tensor | None,
        **settings: Any,
    ) -> None:
        if x not in self.tensors:
            raise _unsupported(node)
        weight = weight.double()
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.double()
        last = node
        norm = self._norm(node) if kind is Convolution or len(sizes(node)) == 2 else None
        if norm is not None:
            last, factor, term = norm
            weight, bias = weight * factor.reshape(-1, *(1,) * (weight.dim() - 1)), bias * factor + term
        last, limits = self._limits(last)

        def build(inputs: list[Encoding], observed: Encoding | None) -> IntegerOp:
            codes, scale, whole = _quantized(weight, bias, inputs[0], self.weight)
            output = limits.on(observed, inputs[0].scale * float(scale.max()))
            return kind(inputs, output, codes, scale, whole, **settings)

        self._plan(node, last, [x], build)

    def _arithmetic(self, node: fx.Node) -> None:
        """Add, subtract, multiply: of two tensors, or of one and a constant."""
        given = bound(node)
        operands = [given["self"], given["other"]]
        kind = operator_name(node)
        if given.get("alpha", 1) != 1:
            raise OctavoError(f"{where(node)}: alpha is {given['alpha']}; multiply the second tensor first")
        takes = [x if x in self.tensors else self._constant(node, x) for x in operands]
        last, limits = self._limits(node)

        def build(inputs: list[Encoding], observed: Encoding | None) -> IntegerOp:
            scales = [encoding.scale for encoding in inputs]
            if kind == "mul":
                return Multiply(inputs, limits.on(observed, math.prod(scales)))
            return Add(inputs, limits.on(observed, max(scales)), -1 if kind == "sub" else 1)

        self._plan(node, last, takes, build)

    def _constant(self, node: fx.Node, x: Any) -> int:
        """A constant operand as codes, with a range of its own."""
        values = torch.as_tensor(self._value(node, x, "operand")).double().cpu()
        if not bool(values.isfinite().all()):
            raise OctavoError(f"{where(node)}: its constant holds NaN or Inf")
        how = self.activation
        now = Current(how.scale.power_of_two) if isinstance(how.scale, Static) else how.scale
        scale, zero_point = compute_scale(values.flatten(), (values.numel(),), how.format, now, how.affine)
        encoding = encoding_of(how.format, float(scale), None if zero_point is None else int(zero_point))
        codes = encoding.quantize(values)
        self.steps.append(_Step(f"{where(node)}: constant", [], lambda *_: Constant([], encoding, codes), None))
        return self.given + len(self.steps) - 1

    def _concatenate(self, node: fx.Node) -> None:
        """Tensors one after another, or stacked: then each gets the new dimension first."""
        given = bound(node)
        takes = [self.tensors[x] if x in self.tensors else self._constant(node, x) for x in given["tensors"]]
        if operator_name(node) == "stack":
            widen: Build = lambda inputs, _: Move(inputs, inputs[0], "unsqueeze.default", [given["dim"]])  # noqa: E731
            self.steps += [_Step(where(node), [number], widen, None) for number in takes]
            takes = list(range(self.given + len(self.steps) - len(takes), self.given + len(self.steps)))
        last, limits = self._limits(node)

        def build(inputs: list[Encoding], observed: Encoding | None) -> IntegerOp:
            return Concatenate(inputs, limits.on(observed, max(x.scale for x in inputs)), given["dim"])

        self._plan(node, last, takes, build)

    def _function(self, node: fx.Node) -> None:
        """Any function of one tensor's numbers, as a table; what only leads to it needs none."""
        root = self.roots[node]
        if all(self.roots.get(user) is root for user in node.users):
            self.absorbed.add(node)
            return
        if limits_of(node) is not None and node.args[0] is root:
            self._clamp(node)
            return
        if not node.meta["val"].is_floating_point():
            raise _unsupported(node)
        rank = len(sizes(root))

        def apply(values: Tensor) -> Tensor:
            known: dict[fx.Node, Any] = {root: values}

            def operand(x: fx.Node) -> Any:
                if x in known:
                    return known[x]
                if x in self.constants:
                    constant = self.constants[x]
                    if not isinstance(constant, Tensor):
                        return constant
                    constant = (constant.double() if constant.is_floating_point() else constant).cpu()
                    return constant.reshape(*(1,) * (rank - constant.dim()), *constant.shape, 1)
                known[x] = result(x)
                return known[x]

            def result(x: fx.Node) -> Any:
                args, kwargs = fx.map_arg((x.args, x.kwargs), operand)
                return x.target(*args, **kwargs)  # type: ignore[operator]

            found: Tensor = result(node)
            return found

        self._tabulate(node, node, root, apply)

    def _prelu(self, node: fx.Node) -> None:
        given = bound(node)
        x = given["self"]
        slope = self._value(node, given["weight"], "slope").double().cpu()
        behind = max(len(sizes(x)) - 2, 0) + 1 if slope.numel() > 1 else 0
        slope = slope.reshape(-1, *(1,) * behind)
        self._tabulate(node, node, x, lambda values: torch.where(values > 0, values, values * slope))

    def _batch_norm(self, node: fx.Node) -> None:
        """One that could not be folded."""
        x = bound(node)["input"]
        factor, term = (t.cpu().reshape(-1, *(1,) * (len(sizes(x)) - 1)) for t in self._norm_terms(node))
        result = _first_result(node)
        self.absorbed.add(result)
        self._tabulate(node, result, x, lambda values: values * factor + term)

    def _tabulate(self, node: fx.Node, last: fx.Node, x: fx.Node, apply: Callable[[Tensor], Tensor]) -> None:
        """``apply`` takes float64 [codes] to [codes], or to […, codes] with one number a channel before it."""
        lead = apply(torch.zeros(1, dtype=torch.float64)).shape[:-1]
        varying = [dim for dim, n in enumerate(lead, -len(lead)) if n != 1]
        last, limits = self._limits(last)

        def build(inputs: list[Encoding], observed: Encoding | None) -> IntegerOp:
            output = limits.on(observed, 0.0)
            codes = torch.arange(inputs[0].low, inputs[0].high + 1)
            values = inputs[0].values(codes)
            result = apply(values).double()
            result = result.reshape(-1, len(codes)) if varying else result.reshape(-1)
            if bool(result.isnan().any()):
                bad = float(values[result.reshape(-1, len(codes)).isnan().any(0)][0])
                raise OctavoError(f"its result is NaN for {bad:g}, which its input's codes hold")
            return Lookup(inputs, output, output.quantize(result), varying[0] if varying else None)

        self._plan(node, last, [x], build)

    def _clamp(self, node: fx.Node) -> None:
        """One that could not become the limits of what stands before it."""
        found = limits_of(node)
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if found is None:
            raise _unsupported(node)
        limits = found
        self._plan(node, node, [x], lambda ins, _: Clamp(ins, ins[0].limited(limits.low, limits.high)), observed=False)

    def _max_pool(self, node: fx.Node) -> None:
        windows = _windows(node)
        self._keep(node, bound(node)["self"], lambda inputs, output: MaxPool(inputs, output, windows))

    def _average_pool(self, node: fx.Node) -> None:
        given = bound(node)
        settings = (_windows(node), given["count_include_pad"], given.get("divisor_override"))
        pool = self._keep if settings[2] is None else self._average  # a smaller divisor leaves the input's range
        pool(node, given["self"], lambda inputs, output: AveragePool(inputs, output, *settings))

    def _adaptive_max_pool(self, node: fx.Node) -> None:
        given = bound(node)
        size = self._adaptive_size(node, given)
        self._keep(node, given["self"], lambda inputs, output: AdaptiveMaxPool(inputs, output, size))

    def _adaptive_average_pool(self, node: fx.Node) -> None:
        given = bound(node)
        size = self._adaptive_size(node, given)
        self._average(node, given["self"], lambda inputs, output: AdaptiveAveragePool(inputs, output, size))

    def _mean(self, node: fx.Node) -> None:
        given = bound(node)
        dims = _from_the_last(given["self"], given.get("dim"))
        keepdim = bool(given.get("keepdim", False))
        self._average(node, given["self"], lambda inputs, output: Mean(inputs, output, dims, keepdim))

    def _average(self, node: fx.Node, x: fx.Node, make: Callable[[list[Encoding], Encoding], IntegerOp]) -> None:
        last, limits = self._limits(node)
        self._plan(node, last, [x], lambda inputs, observed: make(inputs, limits.on(observed, inputs[0].scale)))

    def _maximum(self, node: fx.Node) -> None:
        given = bound(node)
        if "other" in given:
            raise _unsupported(node)
        dims = _from_the_last(given["self"], given.get("dim"))
        keepdim = bool(given.get("keepdim", False))
        self._keep(node, given["self"], lambda inputs, output: Maximum(inputs, output, dims, keepdim))

    def _adaptive_size(self, node: fx.Node, given: dict[str, Any]) -> list[int | None]:
        x = given["self"]
        wanted = _each(given["output_size"], _dimensions(node))
        size: list[int | None] = []
        for dim, n in enumerate(wanted, -len(wanted)):
            if isinstance(n, fx.Node) and str(n.meta["val"]) != sizes(x)[dim]:
                raise OctavoError(f"{where(node)}: its size is computed from the input's; give it a fixed one")
            size.append(None if isinstance(n, fx.Node) else n)
        return size

    def _pad(self, node: fx.Node) -> None:
        given = bound(node)
        if given.get("mode", "constant") != "constant":
            self._move(node)
            return
        ends = self._value(node, given["pad"], "padding")
        sides = [(ends[i], ends[i + 1]) for i in range(len(ends) - 2, -1, -2)]
        value = float(given["value"] or 0.0)
        x = self.tensors[given["self"]]
        below = value < 0 and all("max_pool" in operator_name(user) for user in node.users)
        if value != 0 and not below:  # it may lie beyond the range of what it pads: both get one of their own
            self._plan(node, node, [x], lambda inputs, observed: Concatenate(inputs, Limits().on(observed, 0.0)))
            x = self.tensors[node]

        def build(inputs: list[Encoding], _: Encoding | None) -> IntegerOp:
            code = int(inputs[0].quantize(torch.tensor(value, dtype=torch.float64)))
            return Pad(inputs, inputs[0], sides, code)

        self._plan(node, node, [x], build, observed=False)

    def _reshape(self, node: fx.Node) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        before, after = sizes(x), sizes(node)
        shape = [n if isinstance(n, int) else -1 for n in after]
        places = [place for place, n in enumerate(shape) if n == -1]
        kept: list[tuple[int, int]] = []
        if len(places) > 1:
            kept = [(place, before.index(after[place])) for place in places if after[place] in before]
        if len(places) - len(kept) > 1:
            raise OctavoError(f"{where(node)}: more than one of its sizes is computed from the input's")
        self._keep(node, x, lambda inputs, output: Reshape(inputs, output, shape, kept))

    def _expand(self, node: fx.Node) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        after = sizes(node)
        before = [1] * (len(after) - len(sizes(x))) + sizes(x)
        if any(isinstance(n, str) and n != own for n, own in zip(after, before, strict=True)):
            raise OctavoError(f"{where(node)}: its size is computed from another tensor's; give it a fixed one")
        wanted = [n if isinstance(n, int) else -1 for n in after]
        self._keep(node, x, lambda inputs, output: Move(inputs, output, "expand.default", [wanted]))

    def _move(self, node: fx.Node) -> None:
        given = bound(node)
        x, *rest = given.values()
        operator = f"{operator_name(node)}.{node.target._overloadname}"  # type: ignore[union-attr]
        arguments = self._value(node, rest, "arguments")
        self._keep(node, x, lambda inputs, output: Move(inputs, output, operator, arguments))

    def _split(self, node: fx.Node) -> None:
        """Each part that is taken up is a slice."""
        given = bound(node)
        x, dim = given["self"], given.get("dim", 0)
        lengths: Any = given.get("split_sizes", given.get("split_size"))
        for user in node.users:
            if user.target is not operator.getitem:
                raise _unsupported(user)
            part = int(user.args[1])  # type: ignore[arg-type]
            if operator_name(node) == "unbind":
                self._keep(user, x, _mover("select.int", [dim, part]))
                continue
            each = [lengths] * (part + 1) if isinstance(lengths, int) else lengths
            if not isinstance(each, list | tuple) or not all(isinstance(n, int) for n in each):
                raise OctavoError(f"{where(node)}: its sizes are computed from the input's; give it fixed ones")
            start, stop = sum(each[:part]), sum(each[: part + 1])
            self._keep(user, x, _mover("slice.Tensor", [dim, start, stop]))

    def _item(self, node: fx.Node) -> None:
        """The first result of an operator that has several; a split's are there already."""
        source, part = node.args
        assert isinstance(source, fx.Node)
        if part != 0:
            raise OctavoError(f"{where(source)}: only its first result can be computed on integers")
        self.tensors[node] = self.tensors[source]


def _shapes(inputs: Mapping[str, fx.Node]) -> dict[str, tuple[int | str, ...]]:
    """The sizes of the inputs; those that may vary are letters, equal ones for equal sizes."""
    letters: dict[int | str, str] = {}
    shapes = {}
    for name, node in inputs.items():
        for n in sizes(node):
            if isinstance(n, str) and not n.isidentifier():
                raise OctavoError(f"the sizes of {name} may vary only as {n}, not freely")
        each = (n if isinstance(n, int) else letters.setdefault(n, chr(ord("a") + len(letters))) for n in sizes(node))
        shapes[name] = tuple(each)
    return shapes


def encoding_of(fmt: Format, scale: float, zero_point: int | None) -> Encoding:
    """The encoding of a tensor with that scale; without a zero point codes are symmetric."""
    assert isinstance(fmt, IntegerFormat)
    if zero_point is None:
        most = min(fmt.high, -fmt.low)
        return Encoding(scale, 0, -most, most, fmt)
    return Encoding(scale, zero_point, fmt.low, fmt.high, fmt)


def _quantized(weight: Tensor, bias: Tensor, x: Encoding, how: Cast) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales [out] of a weight, and its bias [out] in units of their product with the input's scale.

    Where the bias would not fit, its channel's scale grows until it does: its weights are next to nothing beside it.
    """
    matrix = weight.flatten(1)
    if not bool(matrix.isfinite().all() and bias.isfinite().all()):
        raise OctavoError("its weights, with a BatchNorm folded into them, hold NaN or Inf")
    block = how.granularity.block(tuple(matrix.shape))
    scale, _ = compute_scale(matrix, block, how.format, how.scale, affine=False)
    scale = expand_blocks(scale, tuple(matrix.shape), block)[:, 0].float()
    least = bias.abs() / (x.scale * LARGEST_BIAS)
    if isinstance(how.scale, Current) and how.scale.power_of_two:
        least = torch.exp2(least.log2().ceil())
    scale = torch.maximum(scale, least.float())
    channels = Cast(how.format, PerChannel(0), Static(), how.rounding)
    codes = quantize_scaled(matrix, channels, scale.unsqueeze(1)).codes.reshape(weight.shape)
    return codes, scale, (bias / (x.scale * scale.double())).round().int()


def _first_result(node: fx.Node) -> fx.Node:
    """Of an operator with several results the node of the first, else the node."""
    return next((user for user in node.users if user.target is operator.getitem), node)


def _unsupported(node: fx.Node) -> OctavoError:
    return OctavoError(
        f"{where(node)} cannot run on integers. What can: linear layers, convolutions and transposed ones, matmul by a "
        "weight, BatchNorm; add, sub, mul, cat, stack; max, average and adaptive pools, means and maxima; functions "
        "of one number (relu, gelu, sigmoid, …); and what only moves numbers (view, permute, split, pad, nearest "
        "upsampling, …). Leave it out of the model and apply it to the result, or use octavo.quantize_"
    )


def _each(x: Any, count: int) -> list[Any]:
    """One number for every dimension: given as such, as one for all, or as a list of one for all."""
    numbers = list(x) if isinstance(x, list | tuple) else [x]
    return numbers * count if len(numbers) == 1 else numbers


def _dimensions(node: fx.Node) -> int:
    """2 for max_pool2d."""
    found = re.search(r"(\d)d", operator_name(node))
    assert found is not None
    return int(found[1])


def _windows(node: fx.Node) -> list[list[Any]]:
    """One window for every dimension of a pool."""
    given, count = bound(node), _dimensions(node)
    stride = given["stride"] or given["kernel_size"]
    numbers = (given["kernel_size"], stride, given["padding"], given.get("dilation", 1))
    each = zip(*(_each(x, count) for x in numbers), strict=True)
    return [[*window, given["ceil_mode"]] for window in each]


def _from_the_last(x: fx.Node, dims: Any) -> list[int]:
    """Dimensions, all for None or none, counted from the last."""
    rank = len(sizes(x))
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    return sorted((dim % rank) - rank for dim in dims)


def _mover(name: str, arguments: list[Any]) -> Callable[[list[Encoding], Encoding], IntegerOp]:
    return lambda inputs, output: Move(inputs, output, name, arguments)


_NORMS = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "batch_norm", "native_batch_norm")
_RESHAPES = ("reshape", "flatten", "unflatten")
_HANDLERS: dict[str, Callable[[Plan, fx.Node], Any]] = {
    **dict.fromkeys(_NORMS, Plan._batch_norm),
    **dict.fromkeys(CLAMPS, Plan._clamp),
    **dict.fromkeys(_RESHAPES, Plan._reshape),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), Plan._convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), Plan._convolution),
    "linear": Plan._linear,
    **dict.fromkeys(("matmul", "mm"), Plan._matmul),
    "addmm": Plan._addmm,
    **dict.fromkeys(("add", "sub", "mul"), Plan._arithmetic),
    **dict.fromkeys(("cat", "stack"), Plan._concatenate),
    "prelu": Plan._prelu,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), Plan._max_pool),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), Plan._max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), Plan._average_pool),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), Plan._adaptive_max_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), Plan._adaptive_average_pool),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), Plan._adaptive_average_pool),
    "mean": Plan._mean,
    **dict.fromkeys(("amax", "max"), Plan._maximum),
    **dict.fromkeys(("pad", "constant_pad_nd"), Plan._pad),
    "expand": Plan._expand,
    **dict.fromkeys(("split", "split_with_sizes", "unbind"), Plan._split),
    "getitem": Plan._item,
}
_ROUNDING = {*_NORMS, "prelu", "linear", "matmul", "mm", "addmm", "add", "sub", "mul", "cat", "stack", "mean"} | {
    name for name in _HANDLERS if name.startswith(("conv", "adaptive_avg", "_adaptive_avg"))
}
