"""The window of constant biases: where it lies, and what it refuses."""

import pytest
import torch
from torch import nn

from octavo import OctavoError
from octavo.analysis.bias_window import bias_window


def net(size=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    return model


def agreement(model, x, like):
    """Cosine with the float model's output: 1 is best."""
    return lambda m: torch.cosine_similarity(m(x).flatten(), like.flatten(), 0).nan_to_num(0.0).item()


def search(size=1.0, **options):
    model, x = net(size), torch.randn(64, 32)
    return bias_window(model, agreement(model, x, model(x)), **options)


def test_a_window_moves_with_the_numbers():
    found = search()
    assert found.window == tuple(range(found.window[0], found.window[-1] + 1))
    assert found.window[0] < found.bias < found.window[-1]
    assert all(found.scores[bias] >= 0.995 * found.float_score for bias in found.window)
    assert found.scores[-6] < found.scores[found.bias] > found.scores[12]
    assert set(found.scores) == set(range(-6, 13))
    smaller = search(size=2.0**-3)
    assert smaller.window[0] > found.window[0]


def test_more_range_gives_a_wider_window():
    kwargs = {"biases": range(-14, 20), "keep": 0.98}
    assert len(search(fmt="E5M2", **kwargs).window) > len(search(fmt="E3M4", **kwargs).window)


def test_what_cannot_be():
    with pytest.raises(OctavoError, match="no bias to try"):
        search(biases=[])
    with pytest.raises(OctavoError, match="keep"):
        search(keep=1.5)
    with pytest.raises(OctavoError, match="score is nan"):
        bias_window(net(), lambda model: float("nan"))
    nothing = search(biases=[12], keep=1.0)
    assert nothing.window == ()
    with pytest.raises(OctavoError, match=r"no bias keeps 100.0% of .* the best is 12"):
        _ = nothing.bias


def test_gaps_and_nan():
    values = iter([1.0, 0.9, 1.0, float("nan"), 1.0, 1.0, 1.0])
    found = bias_window(net(), lambda model: next(values), biases=[0, 1, 2, 4, 5, 6], keep=0.85)
    assert found.window == (4, 5, 6)
    assert found.scores[2] == 0.0
