"""Percentiles against those of the sorted numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo as ov
from octavo.calibration import MinMax, Percentile

from .streams import CASTS, KINDS, numbers, seen, streams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("count", [1_000, 50_000])
def test_the_right_share_is_outside(kind, percent, count):
    x = numbers(kind, count)
    observer = seen(Percentile(percent), x.split(9_000))
    width = observer.histogram.width.item()
    low, high = (end.item() for end in observer.range(ov.Cast("int8")))
    assert low == -high
    # numpy's, give or take a bin on either side and a number (the last of few is far from the one before)
    sizes = np.sort(np.abs(x.numpy().astype(np.float64)))
    position = percent / 100 * count
    below, above = sizes[max(int(position) - 2, 0)], sizes[min(int(position) + 1, count - 1)]
    assert below - width <= high <= above + width
    assert (x.abs() > high * (1 + 1e-6) + width).sum() <= count * (1 - percent / 100) + 1
    if x.any():
        assert high > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [50, 99, 99.9, 100])
def test_affine_casts_cut_both_tails(kind, percent):
    count = 50_000
    x = numbers(kind, count)
    observer = seen(Percentile(percent), [x])
    width = observer.histogram.width.item()
    low, high = (end.item() for end in observer.range(ov.Cast("uint8", affine=True)))
    ordered = np.sort(x.numpy().astype(np.float64))
    tail = (1 - percent / 100) / 2 * count
    assert ordered[0] <= low <= high <= ordered[-1]
    assert ordered[max(int(tail) - 2, 0)] - 2 * width <= low <= ordered[min(int(tail) + 1, count - 1)] + 2 * width
    assert ordered[max(int(count - tail) - 2, 0)] - 2 * width <= high
    assert high <= ordered[min(int(count - tail) + 1, count - 1)] + 2 * width


@given(streams())
def test_a_hundred_is_min_and_max(stream):
    x, parts = stream
    observer = seen(Percentile(100), parts)
    low, high = observer.range(ov.Cast("uint8", affine=True))
    assert (low.item(), high.item()) == (x.min().item(), x.max().item())
    assert observer.range(ov.Cast("int8"))[1].item() == x.abs().max().item()
    for how in CASTS:
        for mine, other in zip(observer.scale(how), seen(MinMax(), [x]).scale(how), strict=True):
            assert mine is other is None or torch.equal(mine, other)


@given(streams(), st.floats(0.1, 99), st.floats(0, 1))
def test_more_percent_is_a_wider_range(stream, percent, further):
    x, _ = stream
    narrow = seen(Percentile(percent), [x])
    wide = Percentile(percent + further).adopt(narrow)
    for how in CASTS:
        (a, b), (c, d) = narrow.range(how), wide.range(how)
        assert c <= a and b <= d


def test_interpolation():
    """Numbers spread evenly over a bin are found where they are, on both sides and across zero."""
    x = torch.linspace(-1, 1, 200_001)
    observer = seen(Percentile(90), [x])
    low, high = observer.range(ov.Cast("uint8", affine=True))
    assert low.item() == pytest.approx(-0.9, abs=2e-5)
    assert high.item() == pytest.approx(0.9, abs=2e-5)
    for percent in (0.003, 0.01, 33, 99.995):
        assert Percentile(percent).adopt(observer).range(CASTS[0])[1].item() == pytest.approx(percent / 100, abs=2e-5)
