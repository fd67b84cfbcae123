"""A small model of linear layers with something between them, for tests of mixtures of samples."""

import torch
from mixing_models import D, Model, rows
from torch import Tensor, nn


class Through(nn.Module):
    """Linear layers with something between them."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(D, D), nn.Linear(D, D), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def of_rows(between, *shape: int) -> Model:
    torch.manual_seed(0)
    net = Model(Through(between), rows(*shape, D)).double()
    net.given = net.given.double()
    return net
