"""A range with some of its numbers: whole tokens, never too many, whatever comes in whichever pieces."""

import pytest
import torch

from octavo import OctavoError, PerChannel
from octavo.calibration import MinMax
from octavo.calibration.sample import Sample


def fed(parts, keep=8):
    seen = Sample(keep, granularity=PerChannel(-1))
    for x in parts:
        seen.update(x)
    return seen


@pytest.mark.parametrize("sizes", [[1], [8], [9], [3, 4], [100], [5] * 20, [64, 1, 64]])
def test_tokens_are_whole_and_few(sizes):
    tokens = torch.randn(sum(sizes), 6)
    seen = fed(tokens.split(sizes))
    assert 0 < seen.kept.shape[1] <= 8 and seen.kept.shape[0] == 6
    assert all(any(torch.equal(token, x) for x in tokens) for token in seen.kept.T)
    assert torch.equal(seen.kept[:, 0], tokens[0])  # the first of a text is special, and stays
    plain = MinMax(granularity=PerChannel(-1))
    plain.update(tokens)
    assert torch.equal(seen._low, plain._low) and torch.equal(seen._high, plain._high)


def test_it_keeps_a_copy_of_batches_of_rows():
    x = torch.randn(2, 3, 6)
    seen = fed([x])
    expected = x.flatten(0, 1).clone()
    x.zero_()
    assert torch.equal(seen.kept.T, expected)


def test_merged_and_saved():
    parts = torch.randn(60, 6).split(15)
    merged = Sample(8, granularity=PerChannel(-1))
    for x in parts:
        merged.merge(fed([x]))
    assert merged.count == 360 and 0 < merged.kept.shape[1] <= 8
    again = merged.fresh()
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again.kept, merged.kept) and again.settings() == merged.settings()
    again.update(parts[0])
    with pytest.raises(OctavoError, match="does not fit"):
        Sample(2, granularity=PerChannel(-1)).load_state_dict(merged.state_dict())
    with pytest.raises(OctavoError, match="at least one"):
        Sample(0)
