"""Embedding tables as 8-bit codes: half the memory of 16 bits, a quarter of 32.

Only the rows that are asked for become floats. The input is row numbers, so a scheme's input cast has nothing to say
here, and the layer keeps the scheme of its weight alone.
"""

import copy
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.core.qtensor import QTensor
from octavo.core.schemes import Scheme, describe
from octavo.nn.layer import QuantizedLayer

PROBED = 64  # rows of the table on which another class's forward is tried


class QuantizedTable(QuantizedLayer):
    """Rows [rows, dim] as codes and scales; what ``Embedding`` and ``EmbeddingBag`` have in common."""

    by_name_only: ClassVar[bool] = True

    def __init__(self, weight: QTensor, scheme: Scheme, padding_idx: int | None = None) -> None:
        super().__init__(weight, None, self.runs(scheme))
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        """The weight [rows, dim]."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    @classmethod
    def runs(cls, scheme: Scheme) -> Scheme:
        """The scheme's weight, without its input."""
        return Scheme(scheme.weight)

    @classmethod
    def obstacle(cls, module: nn.Module, scheme: Scheme) -> str | None:
        """Why this table cannot be kept under the scheme, or None."""
        assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if module.max_norm is not None:
            return "max_norm changes its weight whenever a row is read"
        if scheme.weight.format.bits > 8:
            return f"{scheme.weight.format.name} is no 8-bit format, and an embedding has nothing else to quantize"
        return super().obstacle(module, cls.runs(scheme))

    @property
    def weight(self) -> Tensor:
        """The whole table as a float tensor, for models that read it past ``forward``; made anew each time."""
        return self.quantized_weight.dequantize()

    def rows(self, indices: Tensor) -> Tensor:
        """The rows of ``indices`` […] as floats […, dim]. Raises what torch raises for indices out of range."""
        q, flat = self.quantized_weight, indices.reshape(-1)

        def of_block(values: Tensor) -> Tensor:
            return values if values.shape[0] == 1 else F.embedding(flat // q.block[0], values)

        codes, scale = F.embedding(flat, q.codes), of_block(q.scale)
        zeros = None if q.zero_point is None else of_block(q.zero_point)
        block = (1 if q.scale.shape[0] > 1 else flat.numel(), q.block[1])
        rows = QTensor(codes, scale, zeros, q.format, block, q.dtype).dequantize()
        return rows.view(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {describe(self.scheme)}"


class ScaledEmbedding(nn.Embedding):
    """Rows of a float table times ``multiplier``."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, multiplier: float) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.multiplier = multiplier

    def forward(self, input: Tensor) -> Tensor:
        """Row numbers […] to rows […, dim]."""
        return super().forward(input) * self.multiplier


class QuantizedEmbedding(QuantizedTable):
    """``Embedding``: rows of a table in 8 bits, times ``multiplier`` where the layer it replaced multiplied them."""

    def __init__(
        self, weight: QTensor, scheme: Scheme, padding_idx: int | None = None, multiplier: float = 1.0
    ) -> None:
        super().__init__(weight, scheme, padding_idx)
        self.multiplier = multiplier

    @classmethod
    def replacing(cls, module: nn.Module, weight: QTensor, scheme: Scheme, **calibrated: Any) -> "QuantizedEmbedding":
        """The 8-bit table in the place of an Embedding, or of one that multiplies its rows by a number."""
        assert isinstance(module, nn.Embedding)
        multiplier = multiplier_of(module)
        assert multiplier is not None
        return cls(weight, scheme, module.padding_idx, multiplier)

    def blank(self) -> nn.Module:
        """An Embedding, or one that multiplies."""
        if self.multiplier == 1:
            return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        return ScaledEmbedding(self.num_embeddings, self.embedding_dim, self.padding_idx, self.multiplier)

    @classmethod
    def same(cls, module: nn.Module) -> bool:
        """Whether a subclass gives rows of its weight, times a number: transformers' scaled word embeddings do."""
        return isinstance(module, nn.Embedding) and multiplier_of(module) is not None

    def forward(self, input: Tensor) -> Tensor:
        """Row numbers […] to rows […, dim]."""
        rows = self.rows(input)
        return self.activate(rows if self.multiplier == 1 else rows * self.multiplier)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        times = "" if self.multiplier == 1 else f", multiplier={self.multiplier:g}"
        return super().extra_repr() + times


class QuantizedEmbeddingBag(QuantizedTable):
    """``EmbeddingBag``: sums, means or maxima of rows of a table in 8 bits."""

    def __init__(
        self,
        weight: QTensor,
        scheme: Scheme,
        padding_idx: int | None = None,
        mode: str = "mean",
        include_last_offset: bool = False,
    ) -> None:
        super().__init__(weight, scheme, padding_idx)
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def replacing(
        cls, module: nn.Module, weight: QTensor, scheme: Scheme, **calibrated: Any
    ) -> "QuantizedEmbeddingBag":
        """The 8-bit table in the place of an EmbeddingBag."""
        assert isinstance(module, nn.EmbeddingBag)
        return cls(weight, scheme, module.padding_idx, module.mode, module.include_last_offset)

    def blank(self) -> nn.Module:
        """An EmbeddingBag."""
        return nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Row numbers [bags, n], or [n] cut into bags at ``offsets``, to [bags, dim]; arguments as for torch."""
        count = input.numel()
        places = torch.arange(count, dtype=input.dtype, device=input.device).view(input.shape)
        if self.padding_idx is not None:
            places = places.where(input != self.padding_idx, count)
        rows = F.pad(self.rows(input.reshape(-1)), (0, 0, 0, 1))  # the last, of zeros, stands for all paddings
        bags = F.embedding_bag(
            places,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=None if self.padding_idx is None else count,
        )
        return self.activate(bags)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


@torch.no_grad()
def multiplier_of(module: nn.Embedding) -> float | None:
    """The number by which an embedding multiplies its rows: 1 for torch's own; None if a subclass does anything else.

    A class with a forward of its own must hold nothing but its weight and floating-point numbers (so nothing that could
    single out a row), and is tried on a small table: it must give every row times the same number, to the bit, in both
    modes, and take row numbers only. Numbers without a value (on meta) are tried with a made-up one.
    """
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    plain = vars(nn.Embedding(1, 1, device="meta"))
    own = [value for name, value in vars(module).items() if name not in plain]
    buffers = dict(module.named_buffers())
    if (
        any(module.children())
        or dict(module.named_parameters()).keys() != {"weight"}
        or not all(value is None or isinstance(value, float | bool) for value in own)
        or not all(buffer.numel() == 1 and buffer.is_floating_point() for buffer in buffers.values())
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    dtype = module.weight.dtype
    table = torch.randn(PROBED, module.weight.shape[1], generator=generator).to(dtype)
    try:
        twin = copy.deepcopy(module, {id(module.weight): nn.Parameter(table, requires_grad=False)})
        for name, buffer in buffers.items():
            twin.register_buffer(name, torch.full_like(buffer, 1.5, device="cpu") if buffer.is_meta else buffer.cpu())
        twin.padding_idx = None if module.padding_idx is None else min(module.padding_idx, PROBED - 1)
        every = torch.arange(PROBED)
        results = {every: twin.train().forward(every)}
        for indices in (every.flip(0).view(2, -1), torch.randint(PROBED, (3, 5), generator=generator), every[:1].int()):
            results[indices] = twin.eval().forward(indices)
        candidates = []
        for ones in (torch.ones_like(table, dtype=torch.float32), torch.ones_like(table)):
            twin.weight = nn.Parameter(ones, requires_grad=False)
            candidates.append(float(twin.forward(every).flatten()[0]))
    except Exception:  # it wants something else than row numbers
        return None
    if _takes(twin, torch.randn(2, PROBED, generator=generator)):
        return None
    for multiplier in candidates:
        if all(_equal(y, F.embedding(indices, table) * multiplier) for indices, y in results.items()):
            return multiplier
    return None


def _takes(module: nn.Embedding, x: Tensor) -> bool:
    try:
        module.forward(x)
    except Exception:  # whatever it raises, it refuses
        return False
    return True


def _equal(y: Any, expected: Tensor) -> bool:
    return isinstance(y, Tensor) and y.dtype == expected.dtype and torch.equal(y, expected)
