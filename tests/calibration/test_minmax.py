"""The exact ends of what was seen."""

import torch
from hypothesis import given

import octavo as ov
from octavo.calibration import MinMax

from .streams import CASTS, seen, streams


@given(streams())
def test_the_ends(stream):
    x, parts = stream
    observer = seen(MinMax(), parts)
    for how in CASTS:
        low, high = observer.range(how)
        assert (low.item(), high.item()) == (x.min().item(), x.max().item())


def test_as_a_dynamic_scale_would_be():
    """The scale of all that was seen is what the dynamic Cast takes of one tensor."""
    x = torch.randn(6, 40)
    for granularity in (ov.PerTensor(), ov.PerChannel(0), ov.PerGroup(7), ov.PerBlock(4, 9)):
        for how in CASTS:
            how = ov.Cast(how.format, granularity, affine=how.affine)
            q, observer = ov.quantize(x, how), seen(MinMax(granularity=granularity), [x])
            scale, zero_point = observer.scale(how)
            assert torch.equal(scale, q.scale)
            assert zero_point is q.zero_point is None or torch.equal(zero_point, q.zero_point)
            assert torch.equal(observer.scale(how, torch.bfloat16)[0], scale.bfloat16().float())
