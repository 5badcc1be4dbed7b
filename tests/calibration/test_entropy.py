"""The rule of TensorRT and ModelOpt against itself written out bin by bin in numpy, with scipy's divergence."""

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy.stats import entropy

import octavo as ov
from octavo.calibration import Entropy
from octavo.calibration.entropy import best_cut

from .streams import CASTS, KINDS, numbers, seen

INT8 = ov.Cast("int8")


def even_levels(number):
    return lambda cut: np.digitize(np.arange(cut), np.linspace(0, cut, number + 1)) - 1


def rounded_levels(dtype):
    """Bins whose middles round to one number are of one level, when the cut is the format's largest; ties go up."""
    most = float(ml_dtypes.finfo(dtype).max)
    return lambda cut: np.unique(
        ((np.arange(cut) + 0.500001) / cut * most).astype(dtype).astype(np.float64), return_inverse=True
    )[1]


def divergences(counts, levels):
    """KL(P‖Q) for every cut from 128 up, as the rule says it."""
    bins = np.array(counts, np.float64)
    bins[0] = bins[1]
    found = []
    for cut in range(128, len(bins) + 1):
        reference = bins[:cut].copy()
        reference[-1] += bins[cut:].sum()
        level, used = levels(cut), bins[:cut] > 0
        sums = np.bincount(level, bins[:cut])
        uses = np.bincount(level, used)
        quantized = np.where(used, (sums / np.maximum(uses, 1))[level], 0.0)
        found.append(entropy(reference, quantized) if quantized.any() else np.inf)
    return np.array(found)


def coarse(kind, bins, count=30_000):
    """Counts of |x| in about so many bins."""
    sizes = numbers(kind, count).abs().double()
    return np.histogram(sizes.numpy(), bins, (0, float(sizes.max()) or 1.0))[0]


def check(counts, levels, how, two_signs=True):
    expected = divergences(counts, levels)
    cut = best_cut(torch.from_numpy(counts), how, two_signs)
    assert expected[cut - 128] <= expected.min() + 2e-9
    last = 128 + np.flatnonzero(expected == expected.min()).max()
    assert cut >= last  # of equals the last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [129, 300, 701])
def test_int8(kind, bins):
    check(coarse(kind, bins), even_levels(128), INT8)


@pytest.mark.parametrize("kind", ["normal", "heavy", "relu", "outliers"])
@pytest.mark.parametrize(
    ("how", "two_signs", "levels"),
    [
        (ov.Cast("uint8", affine=True), True, even_levels(128)),
        (ov.Cast("uint8", affine=True), False, even_levels(256)),
        (ov.Cast("int8", affine=True), False, even_levels(256)),
        (ov.Cast("int4"), True, even_levels(8)),
        (ov.Cast("e4m3fn"), True, rounded_levels(ml_dtypes.float8_e4m3fn)),
        (ov.Cast("e5m2"), True, rounded_levels(ml_dtypes.float8_e5m2)),
        (ov.Cast("e3m4"), True, rounded_levels(ml_dtypes.float8_e3m4)),
        (ov.Cast("e2m3"), True, rounded_levels(ml_dtypes.float6_e2m3fn)),
    ],
    ids=lambda value: value.format.name + "-affine" * value.affine if isinstance(value, ov.Cast) else None,
)
def test_other_formats(kind, how, two_signs, levels):
    check(coarse(kind, 331), levels, how, two_signs)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_from_numbers_to_clip(kind):
    """The whole way, on as many bins as the observer has."""
    x = numbers(kind, 50_000)
    sizes = x.abs().double().numpy()
    width = 2.0 ** (np.floor(np.log2(sizes.max())) - 11)
    counts = np.bincount((sizes / width).astype(int))
    assert 2048 <= len(counts) <= 4096
    expected = divergences(counts, even_levels(128))
    low, high = (end.item() for end in seen(Entropy(), x.split(11_111)).range(INT8))
    assert low == -high
    if high < sizes.max():
        assert (high / width).is_integer()
        assert expected[int(high / width) - 128] <= expected.min() + 2e-9
    else:
        assert expected[-1] == expected.min()


def test_outliers_are_clipped_and_a_bulk_is_not():
    bulk = torch.rand(100_000) * 2 - 1
    assert seen(Entropy(), [bulk]).range(INT8)[1] == bulk.abs().max()
    clip = seen(Entropy(), [bulk, torch.tensor([10.0, -12.0])]).range(INT8)[1]
    assert 1 <= clip < 1.1


def test_affine_ranges_end_where_the_data_does():
    affine = ov.Cast("uint8", affine=True)
    for x in (torch.randn(50_000).relu(), torch.nn.functional.gelu(torch.randn(50_000)), -torch.rand(50_000)):
        low, high = seen(Entropy(), [x]).range(affine)
        assert low >= x.min() and high <= x.max()
        assert low == x.min() or high == x.max()
    x = torch.nn.functional.gelu(torch.randn(50_000))
    x[7] = 100
    assert seen(Entropy(), [x]).range(affine)[1] < 50


@pytest.mark.parametrize("fmt", ["int16", "fp16", "bf16", "tf32"])
def test_formats_finer_than_the_bins_clip_little(fmt):
    x = numbers("outliers", 50_000)
    clip = seen(Entropy(), [x]).range(ov.Cast(fmt))[1]
    if fmt in ("int16", "tf32"):
        assert clip == x.abs().max()
    assert clip > 0.4 * x.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_any_data(kind):
    for count in (1, 2, 20_000):
        x = numbers(kind, count)
        for how in (*CASTS, ov.Cast("e5m2"), ov.Cast("int4")):
            low, high = seen(Entropy(), [x]).range(how)
            assert torch.maximum(-low, high) <= x.abs().max()
            assert torch.maximum(-low, high) > 0 or not x.any()
