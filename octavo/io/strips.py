"""What a streamed checkpoint is made of: tensors that are written together, and in which strips they come.

A strip is what is done at a time: some rows of a weight are read, quantized, and named as the layout has them.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from octavo.calibration.minmax import MinMax
from octavo.core.cast import quantize_scaled, quantize_unchecked
from octavo.core.granularity import PerTensor, reduce_blocks
from octavo.core.qtensor import QTensor
from octavo.core.scaling import Constant, Current, scale_of_range
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.io import compressed_tensors
from octavo.io.lineage import Run, Stored
from octavo.io.reader import Reader
from octavo.io.shards import Shape
from octavo.nn.linear import QuantizedLinear
from octavo.nn.swap import Layer

STRIP = 1 << 23  # bytes of a weight that are quantized at a time

#: Rows of outputs, each output's in order.
Pieces = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Strip:
    """What can be done at a time: bytes to read, what to do, and whether the unit is complete with it."""

    nbytes: int
    work: Callable[[], Pieces]
    last: bool


@dataclass(frozen=True)
class Unit(ABC):
    """Tensors that are written together, and what is read for them."""

    outputs: Mapping[str, Shape]
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(run.nbytes for run in self.runs)

    @abstractmethod
    def strips(self, reader: Reader) -> Iterator[Strip]:
        """What is to be done, at least one."""


@dataclass(frozen=True)
class Kept(Unit):
    """A tensor that stays what it is, in the model's dtype; ``layer`` is the one that becomes 8-bit around it."""

    stored: Stored
    layer: str | None

    def strips(self, reader: Reader) -> Iterator[Strip]:
        """The tensor, so many bytes at a time."""
        size = self.stored.nbytes
        for begin in range(0, max(size, 1), STRIP):
            end = min(begin + STRIP, size)
            yield Strip(end - begin, partial(self._copy, reader, begin, end), end == size)

    def _copy(self, reader: Reader, begin: int, end: int) -> Pieces:
        ((name, (dtype, _)),) = self.outputs.items()
        part = reader.read(self.stored, begin, end).view(self.stored.dtype).to(dtype)
        if self.layer is not None and not bool(part.isfinite().all()):
            raise _not_finite(self.layer, "bias")
        return [(name, part)]


@dataclass(frozen=True)
class Eight(Unit):
    """A layer's weight, to become 8 bits.

    ``own``: the float layer's tensors. ``stack``: weights that share one scale with it (``ptq.stacks``).
    """

    layer: Layer
    scheme: Scheme
    layout: str
    own: Mapping[str, Stored]
    stack: "tuple[Rows, ...]"

    def strips(self, reader: Reader) -> Iterator[Strip]:
        """The weight, so many rows at a time, or whole where it does not lie in rows."""
        rows, how = Rows.of(self.layer, self.own), self.scheme.weight
        if rows is None:
            yield Strip(self.nbytes, lambda: self._named(self._quantized_whole(reader), True), True)
            return
        block = how.granularity.block(rows.shape)
        step = max(STRIP // max(rows.row_bytes, 1) // block[0], 1) * block[0]
        alone = block[0] < rows.shape[0] or step >= rows.shape[0] or isinstance(how.scale, Constant)
        if alone and not self.stack:
            cast = partial(quantize_unchecked, how=how, storage=rows.dtype)
        else:
            step = max(STRIP // rows.row_bytes, 1)
            scale, zero_point = self._shared_scale(rows, reader)
            cast = partial(quantize_scaled, how=how, scale=scale, zero_point=zero_point)
        for first in range(0, rows.shape[0], step):
            last = min(first + step, rows.shape[0])
            work = partial(self._quantized_rows, reader, rows, first, last, cast)
            yield Strip((last - first) * rows.row_bytes, work, last == rows.shape[0])

    def _quantized_rows(
        self, reader: Reader, rows: "Rows", first: int, last: int, cast: Callable[[Tensor], QTensor]
    ) -> Pieces:
        return self._named(cast(rows.read(reader, first, last)), first == 0)

    def _quantized_whole(self, reader: Reader) -> QTensor:
        matrix = _whole(self.layer, self.own, reader)
        return quantize_unchecked(matrix, self.scheme.weight, matrix.dtype)

    def _shared_scale(self, rows: "Rows", reader: Reader) -> tuple[Tensor, Tensor | None]:
        """The scale of blocks that reach over all rows, for which everything is read once more."""
        how = self.scheme.weight
        if self.stack:
            watcher = MinMax().fresh(PerTensor())
            for member in self.stack:
                for part in member.parts(reader):
                    watcher.update(part)
            return watcher.scale(how, rows.dtype)
        assert isinstance(how.scale, Current)
        low = high = torch.zeros(())
        for at, part in enumerate(rows.parts(reader)):
            least, most = reduce_blocks(part, how.granularity.block(tuple(part.shape)))
            low, high = (torch.minimum(low, least), torch.maximum(high, most)) if at else (least, most)
        work = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return scale_of_range(low.to(work), high.to(work), how.format, how.affine, how.scale.power_of_two, rows.dtype)

    def _named(self, part: QTensor, first: bool) -> Pieces:
        """The strip's tensors under the names of the layout, and of the layer, which may have several."""
        if not bool(part.scale.isfinite().all()):
            raise _not_finite(self.layer.name, "weight")
        found: dict[str, Tensor | None] = {}
        for name in self.layer.names:
            if self.layout == "octavo":
                found |= {f"{name}.codes": part.codes, f"{name}.scale": part.scale}
                found[f"{name}.zero_point"] = part.zero_point
            else:
                found |= compressed_tensors.tensors(name, QuantizedLinear(part, None, self.scheme))
                if f"{name}.weight_shape" in found:
                    found[f"{name}.weight_shape"] = torch.tensor(self.layer.matrix.shape)
        # what has its whole shape, such as a scale for all rows, comes with every strip
        return [
            (name, tensor.to(self.outputs[name][0]))
            for name, tensor in found.items()
            if tensor is not None and (first or tuple(tensor.shape) != self.outputs[name][1])
        ]


@dataclass(frozen=True)
class Rows:
    """A matrix whose rows lie in files one after the other, and the dtype the model has it in."""

    stored: Stored
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: Layer, own: Mapping[str, Stored]) -> "Rows | None":
        """A layer's weight, unless it is computed, turned round, or empty."""
        matrix, stored = layer.matrix, layer.module._parameters.get("weight")
        if stored is None or not matrix.is_contiguous() or not stored.is_contiguous() or not matrix.numel():
            return None
        if matrix.untyped_storage()._cdata != stored.untyped_storage()._cdata:
            return None
        return cls(own["weight"], (matrix.shape[0], matrix.shape[1]), matrix.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the files."""
        return self.shape[1] * self.stored.dtype.itemsize

    def read(self, reader: Reader, first: int, last: int, again: bool = False) -> Tensor:
        """Some rows, in the model's dtype."""
        part = reader.read(self.stored, first * self.row_bytes, last * self.row_bytes, again)
        return part.view(self.stored.dtype).view(-1, self.shape[1]).to(self.dtype)

    def parts(self, reader: Reader) -> Iterator[Tensor]:
        """All rows, which will be read again."""
        step = max(STRIP // self.row_bytes, 1)
        for first in range(0, self.shape[0], step):
            yield self.read(reader, first, min(first + step, self.shape[0]), again=True)


def _whole(layer: Layer, own: Mapping[str, Stored], reader: Reader) -> Tensor:
    """A layer's weight matrix, from all of its tensors."""
    module: nn.Module = copy.deepcopy(layer.module).to_empty(device="cpu")
    for name, tensor in module.state_dict().items():
        stored = own[name]
        numbers = reader.read(stored, 0, stored.nbytes, again=name == "bias").view(stored.dtype)
        tensor.copy_(numbers.view(tensor.shape))
    return layer.eight_bit.matrix(module).detach()


def _not_finite(layer: str, part: str) -> OctavoError:
    return OctavoError(
        f"{layer}.{part} holds NaN or Inf: the checkpoint is damaged; mend it, or leave the layer alone with a rule "
        f"for {layer!r}"
    )
