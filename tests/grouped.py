"""A trunk of nested modules with a head for each of three tasks, for tests of groups."""

import torch
from torch import nn

K = 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x + self.scale * self.inner(x).tanh()


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def net():
    torch.manual_seed(0)
    return Trunk().double(), nn.ModuleList(nn.Linear(6, 1) for _ in range(K)).double(), torch.randn(8, 4).double()


def losses_of(trunk, heads, x):
    features = trunk(x)
    return [(head(features) - k).square().mean() for k, head in enumerate(heads)]
