"""Magnitudes against counts by hand."""

import math

import torch
from torch import nn

from octavo.analysis.magnitudes import OCTAVES, PER_OCTAVE, magnitudes, of
from octavo.nn import swap


def test_counts_against_a_loop():
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) ** 9
    x[0, :5], x[1], x[2, 3] = 0.0, 0.0, math.nan
    found = of(x)
    counts, below, zeros = [0] * (OCTAVES * PER_OCTAVE), 0, 0
    for row in x.nan_to_num(0.0).abs().tolist():
        for number in row:
            if number == 0:
                zeros += 1
                continue
            place = math.ceil(math.log2(number / max(row)) * PER_OCTAVE) + OCTAVES * PER_OCTAVE - 1
            below += place < 0
            if place >= 0:
                counts[place] += 1
    assert (found.below, found.zeros, found.total) == (below, zeros, x.numel())
    assert sum(abs(a - b) for a, b in zip(found.counts, counts, strict=True)) <= 2  # ties of two logarithms


def test_layers_and_their_inputs():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    layers = swap.layers(model)
    found = magnitudes(model, layers, [torch.randn(3, 8), torch.randn(5, 8)])
    assert [one.layer for one in found] == ["0", "2"]
    assert found[0].weights.total == 128 and found[0].inputs.total == 64 and found[1].inputs.total == 128
    assert magnitudes(model, layers, [])[0].inputs is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_shares_a_scale():
    """A picture's numbers do, in or without a batch, and in one dimension; of a linear layer's input each vector's."""
    cases = [
        (nn.Conv2d(2, 4, 3), torch.rand(5, 2, 6, 7) + 1, 5),
        (nn.Conv2d(2, 4, 3), torch.rand(2, 6, 7) + 1, 1),
        (nn.Conv1d(2, 4, 3), torch.rand(5, 2, 9) + 1, 5),
        (nn.Linear(7, 4), torch.rand(5, 2, 3, 7) + 1, 30),
        (nn.Linear(7, 4), torch.rand(7) + 1, 1),
    ]
    for module, x, rows in cases:
        model = nn.Sequential(module)
        found = magnitudes(model, swap.layers(model), [x])[0].inputs
        assert found == of(x.reshape(rows, -1)) and found.total == x.numel()
