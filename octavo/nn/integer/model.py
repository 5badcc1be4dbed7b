"""A network of operations on codes: floats end where its input is quantized and begin where its output is dequantized.

``IntegerModel(x)`` runs on integers and ``simulate`` on real numbers in float64; the results are equal. ``drift`` tells
how far both are from plain fake quantization, which rounds real numbers where the integers multiply and shift.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from octavo.errors import OctavoError
from octavo.nn.integer.elementwise import Add, Clamp, Concatenate, Constant, Lookup, Multiply
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.moves import Move, Pad, Reshape
from octavo.nn.integer.op import IntegerOp
from octavo.nn.integer.pools import AdaptiveAveragePool, AdaptiveMaxPool, AveragePool, Maximum, MaxPool, Mean
from octavo.nn.integer.sums import Convolution, Linear

#: Every operation by its name; a file can name no other.
OPS: dict[str, type[IntegerOp]] = {
    kind.__name__: kind
    for kind in (
        *(Linear, Convolution, Add, Multiply, Concatenate, MaxPool, AveragePool, AdaptiveAveragePool, Mean),
        *(AdaptiveMaxPool, Maximum, Clamp, Lookup, Constant, Pad, Reshape, Move),
    )
}


@dataclass(frozen=True)
class Input:
    """One tensor that the model takes: its name, the encoding of its codes, and its shape.

    A size that may vary is a letter, and the same letter stands for the same size.
    """

    name: str
    encoding: Encoding
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Drift:
    """How far one operation's codes are from those of plain fake quantization: the share that differ, the most."""

    name: str
    share: float
    most: int


class IntegerModel(nn.Module):
    """A network on codes; made by ``octavo.integer_only``.

    Its tensors are numbered, inputs first, then the result of every operation. ``wiring`` has the numbers that each
    operation takes, ``result`` those that are returned, in lists, tuples and dicts. ``names`` say what each operation
    was in the float model.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        operations: Sequence[IntegerOp],
        wiring: Sequence[Sequence[int]],
        names: Sequence[str],
        result: Any,
    ) -> None:
        super().__init__()
        self.inputs, self.wiring, self.names, self.result = (
            tuple(inputs),
            tuple(map(tuple, wiring)),
            tuple(names),
            result,
        )
        self.operations = nn.ModuleList(operations)
        self.encodings = [*(x.encoding for x in inputs), *(operation.output for operation in operations)]
        if not len(self.wiring) == len(self.names) == len(operations) or not inputs:
            raise OctavoError("an integer model has inputs, and for each operation a name and the tensors it takes")
        for number, (operation, takes) in enumerate(zip(operations, self.wiring, strict=True), len(inputs)):
            known = all(type(i) is int and 0 <= i < number for i in takes)
            if not known or operation.inputs != tuple(self.encodings[i] for i in takes):
                raise OctavoError(f"{self.names[number - len(inputs)]}: it does not take what it is given")
        self.outputs = list(_leaves(result))
        if not self.outputs or not all(type(i) is int and 0 <= i < len(self.encodings) for i in self.outputs):
            raise OctavoError("an integer model returns at least one of its own tensors")
        last = {i: number for number, takes in enumerate(self.wiring) for i in takes}
        self._spent = [
            [i for i in set(takes) if last[i] == number and i not in self.outputs]
            for number, takes in enumerate(self.wiring)
        ]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Float tensors as the float model takes them, to float32 results in the same lists, tuples and dicts.

        Everything between is integers. Raises ``OctavoError`` for NaN, and for shapes other than the model's.
        """
        codes = self.run(self.quantize(*args, **kwargs))
        values = {i: self.encodings[i].dequantize(x) for i, x in zip(self.outputs, codes, strict=True)}
        return _filled(self.result, values)

    def quantize(self, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
        """The codes of float inputs, in the order of ``inputs``."""
        return [own.encoding.quantize(x) for own, x in zip(self.inputs, self._bind(args, kwargs), strict=True)]

    def run(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """From the codes of the inputs to those of the outputs, in the order of ``outputs``; integers only."""
        return self._run("forward", codes)

    def simulate(self, *args: Tensor, fixed_point: bool = True, **kwargs: Tensor) -> Any:
        """The same on real numbers in float64, equal to ``forward`` bit for bit.

        ``fixed_point=False``: plain fake quantization, which rounds every result to its nearest code.
        """
        codes = zip(self.inputs, self.quantize(*args, **kwargs), strict=True)
        values = self._run("rounded" if fixed_point else "plain", [own.encoding.values(x) for own, x in codes])
        return _filled(self.result, {i: x.float() for i, x in zip(self.outputs, values, strict=True)})

    def drift(self, *args: Tensor, **kwargs: Tensor) -> list[Drift]:
        """After every operation, how far the integers are from plain fake quantization of the whole model."""
        codes = self.quantize(*args, **kwargs)
        exact = self._each("forward", codes)
        plain = self._each("plain", [own.encoding.values(x) for own, x in zip(self.inputs, codes, strict=True)])
        drifts = []
        for name, encoding, x, y in zip(self.names, self.encodings[len(self.inputs) :], exact, plain, strict=True):
            steps = (encoding.values(x) - y).div(encoding.scale).round().abs()
            share = float((steps > 0).double().mean()) if steps.numel() else 0.0
            drifts.append(Drift(name, share, int(steps.max()) if steps.numel() else 0))
        return drifts

    def _run(self, way: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        kept = {i: x for i, x in enumerate(tensors) if i in self.outputs}
        for number, x in enumerate(self._each(way, tensors), len(self.inputs)):
            if number in self.outputs:
                kept[number] = x
        return [kept[i] for i in self.outputs]

    def _each(self, way: str, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The result of one operation after another; what nothing will take any more is forgotten."""
        if len(tensors) != len(self.inputs):
            raise OctavoError(f"the model takes {len(self.inputs)} tensors, not {len(tensors)}")
        alive = dict(enumerate(tensors))
        for number, (operation, takes) in enumerate(zip(self.operations, self.wiring, strict=True)):
            assert isinstance(operation, IntegerOp)
            given = [alive[i] for i in takes]
            try:
                if way == "plain":
                    x = operation.output.fake_quantize(operation.real(*given))
                else:
                    x = operation(*given) if way == "forward" else operation.rounded(*given)
            except (RuntimeError, IndexError, ValueError, TypeError, OctavoError) as error:
                shapes = ", ".join(str(list(x.shape)) for x in given)
                raise OctavoError(f"{self.names[number]} cannot take {shapes}: {error}") from error
            alive[number + len(self.inputs)] = x
            for i in self._spent[number]:
                del alive[i]
            yield x

    def _bind(self, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
        names = [own.name for own in self.inputs]
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or given.keys() & kwargs.keys() or {*given, *kwargs} != {*names}:
            raise OctavoError(f"the model takes {', '.join(names)}, each once")
        given.update(kwargs)
        sizes: dict[str, int] = {}
        for own in self.inputs:
            x = given[own.name]
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise OctavoError(f"{own.name} is a float tensor, not {getattr(x, 'dtype', type(x).__name__)}")
            fits = len(x.shape) == len(own.shape) and all(
                n == (sizes.setdefault(size, n) if isinstance(size, str) else size)
                for n, size in zip(x.shape, own.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join(map(str, own.shape))
                raise OctavoError(
                    f"{own.name} has the shape {list(x.shape)}; the model was made for [{wanted}]"
                    + (", where a letter is any size, and the same wherever it stands" if sizes else "")
                )
            if bool(x.isnan().any()):
                raise OctavoError(f"{own.name} holds {int(x.isnan().sum())} NaN, for which there is no code")
        return [given[name] for name in names]


def _leaves(result: Any) -> Iterator[int]:
    """The tensors in a nest of lists, tuples and dicts, each once a place; None stands for itself."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        for part in result:
            yield from _leaves(part)
    elif result is not None:
        yield result


def _filled(result: Any, values: Mapping[int, Tensor]) -> Any:
    if isinstance(result, Mapping):
        return {key: _filled(part, values) for key, part in result.items()}
    if isinstance(result, list | tuple):
        return type(result)(_filled(part, values) for part in result)
    return None if result is None else values[result]
