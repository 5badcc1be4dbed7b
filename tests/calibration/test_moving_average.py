"""The recurrence, step by step."""

import pytest
import torch

import octavo as ov
from octavo.calibration import MovingAverage

from .streams import CASTS, seen


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999])
def test_the_recurrence(momentum):
    tensors = [torch.randn(50, dtype=torch.float64).float() * (i + 1) for i in range(12)]
    low, high = (float(x) for x in tensors[0].aminmax())
    for x in tensors[1:]:
        low = momentum * low + (1 - momentum) * float(x.min())
        high = momentum * high + (1 - momentum) * float(x.max())
    whole = seen(MovingAverage(momentum), [*tensors[:3], torch.empty(0), *tensors[3:]])
    joined = seen(MovingAverage(momentum), tensors[:5])
    middle, last = seen(MovingAverage(momentum), tensors[5:6]), seen(MovingAverage(momentum), tensors[6:])
    middle.merge(last)
    joined.merge(middle)
    for observer in (whole, joined):
        found = observer.range(CASTS[0])
        assert [end.item() for end in found] == pytest.approx([low, high], rel=1e-6)


def test_one_outlier_fades():
    tensors = [torch.tensor([-1.0, 1.0])] * 20
    tensors[3] = torch.tensor([-1.0, 1000.0])
    assert seen(MovingAverage(), tensors).range(CASTS[0])[1] < 20
    assert seen(MovingAverage(), tensors).range(CASTS[0])[0] == pytest.approx(-1)


def test_it_starts_anew():
    observer = seen(MovingAverage(0.9), [torch.full((3,), 5.0)] * 4)
    observer.load_state_dict(MovingAverage().state_dict())
    observer.update(torch.tensor([-2.0, 3.0]))
    assert observer.range(CASTS[0]) == (-2, 3)


def test_channels_do_not_mix():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    observer = seen(MovingAverage(0.75, granularity=ov.PerChannel(0)), [x, y])
    low, high = observer.range(ov.Cast("int8", ov.PerChannel(0)))
    torch.testing.assert_close(low, 0.75 * x.amin(1, True) + 0.25 * y.amin(1, True))
    torch.testing.assert_close(high, 0.75 * x.amax(1, True) + 0.25 * y.amax(1, True))
