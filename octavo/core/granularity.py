"""How many numbers share one scale.

A granularity cuts a tensor into equal blocks, ragged at the far edges, and every block has one scale. The scale tensor
has the rank of the tensor and one element a block, so that its *shape* shows the granularity: ``[1, 1]`` one scale,
``[N, 1]`` one a row, ``[N, K/32]`` one a group of 32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import OctavoError


@dataclass(frozen=True)
class PerTensor:
    """One scale for everything: scale shape ``[1, …, 1]``."""

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's size along each dimension."""
        return shape


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of ``axis``, as for the output channels of a weight [N, K]: ``[N, 1]``."""

    axis: int = 0

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's size along each dimension."""
        if not -len(shape) <= self.axis < len(shape):
            raise OctavoError(f"PerChannel(axis={self.axis}) does not fit a tensor of shape {list(shape)}")
        axis = self.axis % len(shape)
        return tuple(1 if i == axis else n for i, n in enumerate(shape))


@dataclass(frozen=True)
class PerToken:
    """One scale for each row along the last dimension, as for activations [batch, token, K]: ``[batch, token, 1]``."""

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's size along each dimension."""
        return (*(1 for _ in shape[:-1]), *shape[-1:])


@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` neighbours along the last dimension: ``[…, ⌈K/size⌉]``."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise OctavoError(f"PerGroup needs a positive size, not {self.size}")

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's size along each dimension."""
        return (*(1 for _ in shape[:-1]), *(min(self.size, n) for n in shape[-1:]))


@dataclass(frozen=True)
class PerBlock:
    """One scale for each tile of the last two dimensions, as DeepSeek-V3's 128 × 128: ``[⌈N/rows⌉, ⌈K/cols⌉]``."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise OctavoError(f"PerBlock needs positive sizes, not {self.rows} × {self.cols}")

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's size along each dimension."""
        if len(shape) < 2:
            raise OctavoError(f"PerBlock({self.rows}, {self.cols}) needs two dimensions, the tensor is {list(shape)}")
        return (*(1 for _ in shape[:-2]), min(self.rows, shape[-2]), min(self.cols, shape[-1]))


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock


def scale_shape(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are along each dimension; an empty dimension still has one, which is empty."""
    return tuple(max(1, -(-n // b)) if b else 1 for n, b in zip(shape, block, strict=True))


def reduce_blocks(x: Tensor, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element of every block, both of the scale's shape; 0 where a block is empty."""
    counts = scale_shape(tuple(x.shape), block)
    if x.numel() == 0:
        return x.new_zeros(counts), x.new_zeros(counts)
    whole = [dim for dim, count in enumerate(counts) if count == 1]
    cut = [dim for dim, count in enumerate(counts) if count > 1 and block[dim] > 1]
    low = high = x
    if len(whole) == x.dim():
        low, high = (edge.view(counts) for edge in torch.aminmax(x))
    elif whole:  # aminmax along a dimension takes ten times as long
        low, high = x.amin(whole, keepdim=True), x.amax(whole, keepdim=True)
    for dim in cut:
        low, high = _reduce(low, dim, block[dim], True), _reduce(high, dim, block[dim], False)
    return low, high


def _reduce(x: Tensor, dim: int, size: int, least: bool) -> Tensor:
    missing = -x.shape[dim] % size
    if missing:  # a ragged edge: repeat the last element, which changes no minimum or maximum
        last = x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([x, last.expand(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)
    x = x.unflatten(dim, (-1, size))
    return x.amin(dim + 1) if least else x.amax(dim + 1)


def expand_blocks(scale: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """The scale laid out so that it broadcasts against the tensor: each block's value under each of its elements."""
    for dim, (n, b) in enumerate(zip(shape, block, strict=True)):
        if scale.shape[dim] > 1 and b > 1:
            scale = scale.repeat_interleave(b, dim).narrow(dim, 0, n)
    return scale
