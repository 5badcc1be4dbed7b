"""Channels that are mixed on their way are noticed, however little the scale is."""

import pytest
import torch
from torch import nn

from octavo import OctavoError
from octavo.ptq.smooth import smooth_
from octavo.ptq.trial import Move, unfit

WIDTH = 16
BACKWARDS = torch.arange(WIDTH - 1, -1, -1)
MIXED = {
    "shuffled": lambda x, n: n.view(-1, 4, 4).transpose(-1, -2).reshape(n.shape),
    "reversed": lambda x, n: n[:, BACKWARDS],
    "shifted": lambda x, n: n.repeat(1, 2)[:, 8:24],
    "squared": lambda x, n: n * n,
    "divided by": lambda x, n: x.div(n),
    "averaged": lambda x, n: n[:, :5].mean(-1, keepdim=True).expand(n.shape),
}


class Model(nn.Module):
    """A norm, something, a linear layer whose columns are as large as what comes to them: each s is nearly 1."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(2)
        self.between = between
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)
        self.data = [4 * torch.randn(6, WIDTH, dtype=torch.float64) for _ in range(3)]
        self.double()
        with torch.no_grad():
            seen = torch.cat([self.between(x, self.norm(x)) for x in self.data]).abs().amax(0)
            own = self.linear.weight.abs().amax(0)
            self.linear.weight *= seen / own * (1 + 0.4 * torch.rand(WIDTH, dtype=torch.float64))

    def forward(self, x):
        return self.linear(self.between(x, self.norm(x)))


@pytest.mark.parametrize("kind", MIXED)
def test_channels_that_are_mixed_are_left_alone(kind):
    model = Model(MIXED[kind]).eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(OctavoError, match="nothing to smooth"):
        smooth_(model, model.data, 0.5)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("scale", [torch.ones(WIDTH), torch.full((WIDTH,), 1.3), torch.logspace(-3, 3, WIDTH)])
def test_a_trial_tells_whatever_the_scale(scale):
    for kind, between in MIXED.items():
        model = Model(between).eval()
        move = Move(model.norm, {"linear": model.linear}, scale)
        assert unfit(model, [move], model.data[0], None) == [move], kind
    model = Model(lambda x, n: n.relu()).eval()
    move = Move(model.norm, {"linear": model.linear}, scale)
    assert unfit(model, [move], model.data[0], None) == []
