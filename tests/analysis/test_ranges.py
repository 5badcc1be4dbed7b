"""How numbers lie within a range, against numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import octavo as ov
from octavo.analysis.ranges import Tally, watch_inputs
from octavo.calibration.minmax import MinMax
from octavo.errors import OctavoError


def test_int8_counts_are_numpys(generator):
    x = torch.randn(1000, 7, generator=generator)
    how, scale = ov.Cast("int8"), torch.tensor([[0.01]])
    tally = Tally(float(x.min()), float(x.max()), how, scale)
    for part in x.split(300):
        tally.update(part)
    found, numbers = tally.spread(), x.numpy().astype(np.float64).ravel()
    assert found.count == 7000
    assert np.abs(np.subtract(found.counts, np.histogram(numbers, found.edges)[0])).sum() <= 2  # at the bins' edges
    scale = float(np.float32(0.01))
    beyond = np.abs(numbers) > 127.5001 * scale
    assert sum(found.clipped) == beyond.sum() > 100
    assert found.clipped_share == beyond.mean()
    y = np.clip(np.rint(numbers / scale), -127, 127) * scale
    assert found.zeroed == ((y == 0) & (numbers != 0)).sum()
    assert math.isclose(found.sqnr, 10 * math.log10((numbers**2).sum() / ((numbers - y) ** 2).sum()), rel_tol=1e-5)
    assert found.widest == found.narrowest == pytest.approx((-1.27, 1.27))
    assert found.ranges == 1


def test_affine_clips_at_both_ends():
    x = torch.tensor([-1.0, -0.1, 0.0, 1.0, 2.54, 2.56, 3.0])
    how = ov.Cast("uint8", affine=True)
    tally = Tally(-1.0, 3.0, how, torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
    tally.update(x)
    found = tally.spread()
    assert found.widest == pytest.approx((0.0, 2.55))
    assert sum(found.clipped) == 4  # of 2.56, a whole step beyond the end, rounding is not to blame
    assert found.zeroed == 2


def test_what_saturation_moves_no_further_than_rounding_is_not_clipped():
    tally = Tally(-1.3, 1.3, ov.Cast("int8"), torch.tensor([0.01]))
    tally.update(torch.tensor([1.2749, -1.2749, 1.2751, -1.2751]))
    assert sum(tally.spread().clipped) == 2


def test_ranges_of_channels():
    x = torch.tensor([[1.0, -1.0], [8.0, 4.0]])
    how = ov.Cast("e4m3fn", ov.PerChannel(0))
    tally = Tally(-1.0, 8.0, how, torch.tensor([[1 / 448], [4 / 448]]))
    tally.update(x)
    found = tally.spread()
    assert found.ranges == 2
    assert found.widest == pytest.approx((-4, 4))
    assert found.narrowest == pytest.approx((-1, 1))
    assert sum(found.clipped) == 1


def test_scales_of_their_own():
    tally = Tally(-4.0, 4.0, ov.Cast("int8", ov.PerToken()))
    tally.update(torch.tensor([[1.0, -2.0], [4.0, 0.0]]))
    tally.update(torch.empty(0, 2))
    found = tally.spread()
    assert (found.ranges, sum(found.clipped), found.count) == (0, 0, 4)
    assert found.widest == pytest.approx((-4, 4))
    assert found.narrowest == pytest.approx((-2, 2))


def test_one_number_only():
    tally = Tally(0.0, 0.0, ov.Cast("int8"), torch.ones(1))
    with pytest.raises(OctavoError, match="no numbers"):
        tally.spread()
    tally.update(torch.zeros(5))
    assert (tally.spread().counts[0], tally.spread().sqnr) == (5, math.inf)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = nn.Linear(2, 2), nn.Linear(2, 2), nn.Embedding(3, 2)

    def forward(self, x, ids):
        self.table(ids)
        return self.a(input=x)


def test_inputs_of_a_layer():
    net, seen = Net().train(), []
    batches = [(torch.ones(1, 2), torch.tensor([0])), (torch.zeros(3, 2), torch.tensor([1]))]
    watch_inputs(net, "a", batches, seen.append)
    assert [x.shape for x in seen] == [(1, 2), (3, 2)]
    assert net.training
    assert not net.a._forward_pre_hooks
    with pytest.raises(OctavoError, match="layer b saw no data in 2 batches"):
        watch_inputs(net, "b", batches, seen.append)
    with pytest.raises(OctavoError, match=r"layer table takes torch.int64"):
        watch_inputs(net, "table", batches, seen.append)
    batches.append((torch.tensor([[1.0, math.nan]]), torch.tensor([0])))
    with pytest.raises(OctavoError, match="the input of layer a in batch 2: 1 of 2"):
        watch_inputs(net, "a", batches, MinMax().update)
    assert not net.a._forward_pre_hooks
