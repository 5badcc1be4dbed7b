"""Blocks and scales: shapes, minima and maxima, against loops over every element."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo import OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.granularity import expand_blocks, reduce_blocks, scale_shape


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (PerTensor(), (6, 8), (1, 1)),
        (PerTensor(), (), ()),
        (PerTensor(), (0, 3), (1, 1)),
        (PerTensor(), (2, 3, 4, 5), (1, 1, 1, 1)),
        (PerChannel(0), (6, 8), (6, 1)),
        (PerChannel(1), (6, 8), (1, 8)),
        (PerChannel(-1), (6, 8), (1, 8)),
        (PerChannel(-2), (6, 8), (6, 1)),
        (PerChannel(-4), (2, 3, 4, 5), (2, 1, 1, 1)),
        (PerChannel(2), (2, 3, 4, 5), (1, 1, 4, 1)),
        (PerChannel(0), (7,), (7,)),
        (PerChannel(0), (0, 4), (1, 1)),
        (PerToken(), (6, 8), (6, 1)),
        (PerToken(), (2, 3, 8), (2, 3, 1)),
        (PerToken(), (8,), (1,)),
        (PerToken(), (), ()),
        (PerToken(), (0, 8), (1, 1)),
        (PerGroup(4), (6, 8), (6, 2)),
        (PerGroup(5), (6, 8), (6, 2)),
        (PerGroup(3), (6, 8), (6, 3)),
        (PerGroup(8), (6, 8), (6, 1)),
        (PerGroup(100), (6, 8), (6, 1)),
        (PerGroup(1), (2, 3), (2, 3)),
        (PerGroup(4), (2, 3, 9), (2, 3, 3)),
        (PerGroup(4), (), ()),
        (PerGroup(4), (3, 0), (3, 1)),
        (PerBlock(4, 4), (6, 8), (2, 2)),
        (PerBlock(128, 128), (6, 8), (1, 1)),
        (PerBlock(128, 128), (129, 257), (2, 3)),
        (PerBlock(1, 4), (6, 9), (6, 3)),
        (PerBlock(4, 1), (6, 9), (2, 9)),
        (PerBlock(2, 2), (3, 5, 5), (3, 3, 3)),
        (PerBlock(2, 2), (0, 5), (1, 3)),
    ],
)
def test_scale_shapes(granularity, shape, expected):
    block = granularity.block(shape)
    assert len(block) == len(shape)
    assert scale_shape(shape, block) == expected
    low, high = reduce_blocks(torch.randn(shape), block)
    assert low.shape == high.shape == expected
    assert expand_blocks(torch.rand(expected), shape, block).broadcast_to(shape).shape == shape


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_axes_that_are_not_there(shape):
    for axis in (len(shape), -len(shape) - 1, 7):
        with pytest.raises(OctavoError, match="PerChannel"):
            PerChannel(axis).block(shape)


def test_impossible_blocks():
    with pytest.raises(OctavoError, match="two dimensions"):
        PerBlock(2, 2).block((5,))
    for make in (lambda: PerGroup(0), lambda: PerGroup(-4), lambda: PerBlock(0, 4), lambda: PerBlock(4, -1)):
        with pytest.raises(OctavoError, match="positive"):
            make()


@st.composite
def cut_tensors(draw):
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=0, max_size=4)))
    block = tuple(draw(st.integers(1, max(n, 1))) if n else 0 for n in shape)
    return shape, block, draw(st.integers(0, 1000))


def blocks_of(shape, block):
    """For each block its index and the indices of its elements, in a plain loop."""
    counts = scale_shape(shape, block)
    found = {index: [] for index in itertools.product(*map(range, counts))}
    for element in itertools.product(*map(range, shape)):
        found[tuple(e // b if b else 0 for e, b in zip(element, block, strict=True))].append(element)
    return found


@given(cut_tensors())
def test_reduce_and_expand_equal_a_loop(cut):
    shape, block, seed = cut
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    low, high = reduce_blocks(x, block)
    scale = torch.rand(low.shape, generator=torch.Generator().manual_seed(seed))
    spread = expand_blocks(scale, shape, block).broadcast_to(shape)
    for index, elements in blocks_of(shape, block).items():
        inside = [x[e].item() for e in elements]
        assert low[index] == min(inside, default=0.0)
        assert high[index] == max(inside, default=0.0)
        assert all(spread[e] == scale[index] for e in elements)


def test_nan_stays_in_its_block():
    x = torch.ones(5, 7)
    x[4, 6] = math.nan
    low, high = reduce_blocks(x, (2, 3))
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[2, 2] = True
    assert torch.equal(low.isnan(), expected)
    assert torch.equal(high.isnan(), expected)


def test_granularities_are_values():
    assert PerGroup(4) == PerGroup(4) != PerGroup(5)
    assert len({PerTensor(), PerTensor(), PerToken(), PerChannel(0), PerChannel(), PerBlock(1, 2)}) == 4
