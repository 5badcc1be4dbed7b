"""Models with a layer that is known to be sensitive, or to be none."""

import torch
from torch import nn

WIDTH = 64


class Chain(nn.Module):
    """Linear layers one after the other, with a tanh between them. ``large``: layers whose input has a channel that is
    a thousand times the others and means nothing; a scale a token is lost on it, and not one a group of 16."""

    def __init__(self, depth=5, large=()):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(depth)])
        self.large = tuple(large)
        for number in self.large:
            with torch.no_grad():
                self.layers[number].weight[:, 0] = 0

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if number in self.large:
                x = torch.cat([torch.full_like(x[..., :1], 3000.0), x[..., 1:]], -1)
            x = layer(x.tanh() if number and number not in self.large else x) * 1.5
        return x


def batches(count=2, rows=16):
    torch.manual_seed(1)
    return [torch.randn(rows, WIDTH) for _ in range(count)]
