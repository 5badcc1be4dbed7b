"""The best range against brute force on the numbers themselves."""

import pytest
import torch

import octavo as ov
from octavo.calibration import MSE, MinMax

from .streams import CASTS, KINDS, numbers, seen

SYMMETRIC = ["int8", "e4m3fn", "e3m4", "e2m5", "e5m2", "int4", "e2m1", ov.formats.float_format(4, 3, 7.3)]


def loss(x, how, low, high):
    """The mean squared error of quantizing to a range, in float64."""
    observer = seen(MinMax(), [torch.stack([torch.as_tensor(low), torch.as_tensor(high)]).reshape(-1)])
    back = ov.quantize_scaled(x, how, *observer.scale(how)).dequantize()
    return (back.double() - x.double()).square().mean().item()


def mine(x, how, **settings):
    return seen(MSE(**settings), x.split(7_000)).range(how)


@pytest.mark.parametrize("kind", ["normal", "heavy", "relu", "positive", "outliers", "integers", "all magnitudes"])
@pytest.mark.parametrize("fmt", SYMMETRIC, ids=str)
@pytest.mark.parametrize("count", [2_000, 17_000])
def test_near_the_best_clip(kind, fmt, count):
    """Where few numbers make most of the error, or all lie on a lattice, it has a sharp minimum for every clip."""
    x, how = numbers(kind, count), ov.Cast(fmt)
    slack = 1.1 if kind in ("heavy", "integers", "all magnitudes") else 1.005
    low, high = mine(x, how)
    assert torch.equal(low, -high)
    largest = x.abs().max().item()
    found = loss(x, how, low, high)
    clips = [largest * 1.19 * 2 ** (-k / 11) for k in range(60)]
    assert found <= slack * min(loss(x, how, -c, c) for c in clips)
    assert found <= 1.002 * loss(x, how, -largest, largest)


@pytest.mark.parametrize("kind", ["normal", "heavy", "relu", "positive", "negative", "outliers", "gelu"])
@pytest.mark.parametrize("fmt", ["uint8", "int4"])
def test_near_the_best_affine_range(kind, fmt):
    x = torch.nn.functional.gelu(numbers("normal", 17_000) * 3) if kind == "gelu" else numbers(kind, 17_000)
    how = ov.Cast(fmt, affine=True)
    low, high = mine(x, how)
    assert x.min().clamp(max=0) <= low <= high <= x.max().clamp(min=0)
    found = loss(x, how, low, high)
    factors = [2 ** (-k / 3) for k in range(18)]
    ends = [(a, b) for a in factors for b in factors if (a == 1 or x.min() < 0) and (b == 1 or x.max() > 0)]
    slack = 1.05 if kind == "heavy" else 1.01
    assert found <= slack * min(loss(x, how, x.min() * a, x.max() * b) for a, b in ends)


def test_heavier_tails_are_clipped_more():
    normal, heavy = numbers("normal", 40_000), numbers("normal", 40_000)
    heavy[:40] *= 30
    for fmt in ("int4", "e2m1"):
        share = [mine(x, ov.Cast(fmt))[1] / x.abs().max() for x in (normal, heavy)]
        assert share[1] < share[0] < 1


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_of_powers_of_two_are_searched_as_such(power_of_two):
    x, how = numbers("normal", 20_000), ov.Cast("int4", scale=ov.Static(power_of_two))
    scale, _ = seen(MSE(), [x]).scale(how)
    found = loss(x, how, *mine(x, how))
    clips = [x.abs().max().item() * 2 ** (-k / 8) for k in range(40)]
    assert found <= 1.005 * min(loss(x, how, -c, c) for c in clips)
    assert bool(scale.log2().frac() == 0) is power_of_two


def test_channels_are_searched_apart():
    x = torch.stack([numbers(kind, 4_000) for kind in KINDS])
    for how in CASTS:
        channels = ov.Cast(how.format, ov.PerChannel(0), affine=how.affine)
        low, high = seen(MSE(granularity=ov.PerChannel(0)), [x]).range(channels)
        for row, a, b in zip(x, low, high, strict=True):
            assert (a, b) == mine(row, how)


def test_rounding_counts():
    """Truncating, a wider range is better for what it keeps; random rounding is searched as if to nearest."""
    x = numbers("normal", 20_000)
    nearest, stochastic, truncating = (
        mine(x, ov.Cast("int4", rounding=rounding))[1] for rounding in ("nearest-even", "stochastic", "toward-zero")
    )
    assert nearest == stochastic != truncating


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("huge", "tiny", "all magnitudes")])
def test_size_does_not_matter(kind):
    """A power of two in the data is one in the range."""
    x = numbers(kind, 20_000)
    for how in CASTS:
        ranges = zip(mine(x, how), mine(x * 2.0**20, how), mine(x * 2.0**-30, how), strict=True)
        assert all(torch.equal(a * 2.0**20, b) and torch.equal(a * 2.0**-30, c) for a, b, c in ranges)
