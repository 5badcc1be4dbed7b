"""The histogram against exact counting in numpy, and that its bins are as the docstring says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from octavo.calibration.histogram import BINS, HELD, Histogram

from .streams import KINDS, numbers, streams


def histogram(*rows):
    """Of rows of numbers, each given as a list of pieces that come one after another."""
    made = Histogram.empty(len(rows))
    for pieces in zip(*rows, strict=True):
        x = torch.stack(list(pieces))
        made.add(x.amin(1), x.amax(1), x)
    return made


def oracle(x):
    """The exponent of the width, and the counts, of one row; float64 is exact here."""
    x = x.numpy().astype(np.float64)
    largest = np.abs(x).max()
    exponent = max(math.frexp(largest)[1] - 13, -149) if largest else -149
    number = np.floor(np.abs(x) / 2.0**exponent).astype(np.int64) * np.where(x < 0, -1, 1)
    counts = np.zeros(2 * BINS - 1, np.int64)
    np.add.at(counts, number + BINS - 1, 1)
    return exponent, torch.from_numpy(counts)


@given(streams(50_000))
def test_counts_are_exact(stream):
    x, pieces = stream
    seen = histogram([p for p in pieces if len(p)]).binned()
    exponent, counts = oracle(x)
    assert seen.exponent.tolist() == [exponent]
    assert torch.equal(seen.counts[0], counts)
    assert (seen.low.item(), seen.high.item()) == (x.min().item(), x.max().item())
    magnitudes = counts[BINS - 1 :] + torch.cat([counts[:1] * 0, counts[: BINS - 1].flip(0)])
    assert torch.equal(seen.magnitudes()[0], magnitudes)
    assert int(seen.counts.sum()) == len(x)


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_bins_are_in_use(kind):
    x = numbers(kind, 3_000)
    seen = histogram([x])
    largest = x.abs().max().double()
    if largest >= 2.0**-126:
        assert BINS / 2 <= largest / seen.width < BINS
    edges = seen.edges()[0]
    assert len(edges) == 2 * BINS and (edges.diff() > 0).all()
    assert edges[0] <= x.min() and x.max() <= edges[-1]
    place = torch.bucketize(x.double(), edges)  # edges[place - 1] < x <= edges[place]
    for number in seen.binned().counts[0].nonzero().flatten().tolist():
        on_edge = (x.double() == edges[number]) | (x.double() == edges[number + 1])
        assert ((place == number + 1) | on_edge).any()


def test_rows_have_widths_of_their_own():
    rows = [numbers(kind, 40_000, i) for i, kind in enumerate(KINDS)]
    pieces = [[*x[:9].split(1), x[9:30_000], x[30_000:]] for x in rows]
    seen = histogram(*pieces).binned()
    for i, x in enumerate(rows):
        exponent, counts = oracle(x)
        assert seen.exponent[i] == exponent and torch.equal(seen.counts[i], counts)


def test_widths_double():
    """Each new piece is far larger, then a hundred times smaller, than what went before."""
    x = [numbers("normal", HELD + 1, i) * 2.0**power for i, power in enumerate((-140, -130, 0, -7, 1, 1, 14, 120))]
    for last in range(1, len(x) + 1):
        exponent, counts = oracle(torch.cat(x[:last]))
        seen = histogram(x[:last])
        assert seen.counts.shape[1] and seen.exponent.tolist() == [exponent]
        assert torch.equal(seen.counts[0], counts)


def test_missing_numbers_are_in_no_bin():
    x = torch.randn(3, HELD)
    x[1, -5:] = math.nan
    for n in (100, HELD):
        seen = Histogram.empty(3)
        for part in (x[:, -n:], torch.ones(3, 2), x[:, -n:]):
            seen.add(torch.full((3,), -9.0), torch.full((3,), 9.0), part)
        assert seen.binned().counts.sum(1).tolist() == [2 * n + 2, 2 * n - 8, 2 * n + 2]
        assert seen.points()[1].sum(1).tolist() == [2 * n + 2, 2 * n - 8, 2 * n + 2]
    long = torch.randn(2, 3 * HELD)
    long[1, -7:] = math.nan
    seen = Histogram.empty(2)
    seen.add(torch.full((2,), -9.0), torch.full((2,), 9.0), long)
    assert seen.counts.sum(1).tolist() == [3 * HELD, 3 * HELD - 7]


def test_counts_beyond_32_bits():
    seen = histogram([torch.ones(HELD + 1)])
    for _ in range(24):
        seen.merge(Histogram(seen.low, seen.high, seen.exponent, seen.counts, seen.held))
    assert int(seen.counts.sum()) == (HELD + 1) << 24 > 2**32
    assert seen.share_outside(torch.tensor([-2.0]), torch.tensor([2.0])).item() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 500, 30_000])
def test_points_stand_for_the_numbers(kind, count):
    x = numbers(kind, count).double()
    seen = histogram([x.float()])
    values, counts, unit = seen.points()
    points = values[0].double() * unit
    assert values.dtype == torch.float32 and int(counts.sum()) == count
    assert math.frexp(unit.item())[0] == 0.5
    assert values.abs().max() <= 1 and (values.abs().max() >= 0.5 or x.abs().max() < 2.0**-126)
    if count < HELD:
        assert torch.allclose(points, x.sort().values, rtol=0, atol=unit.item() * 2.0**-149)  # what float32 can hold
    else:
        spread = points.repeat_interleave(counts[0].long())
        assert ((spread - x.sort().values).abs() <= seen.width).all()


def test_the_share_outside():
    x = torch.cat([torch.randn(99_990), torch.full((10,), 50.0)])
    for data in (x, x[::9], x.relu()):
        seen = histogram([data])
        for low, high in ((-1.0, 2.0), (-9.0, 9.0), (-60.0, 60.0), (0.0, 0.5), (-0.5, 1e9)):
            share = seen.share_outside(torch.tensor([low]), torch.tensor([high])).item()
            exact = ((data < low) | (data > high)).double().mean().item()
            assert share == pytest.approx(exact, abs=0.002)
            if low <= data.min() and high >= data.max():
                assert share == 0


def test_parts_are_all_the_rows():
    x = torch.randn(300, 40)
    seen = histogram(*([row] for row in x))
    parts = list(seen.parts())
    assert len(parts) > 1
    assert torch.equal(torch.cat([part.held for part in parts]), x)
