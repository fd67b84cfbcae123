"""The parts that the architectures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

TOWER = 64  # hidden units of a tower


def features(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU after each, as bottoms and experts have.

    Args:
        widths: of the input, and of each layer.
    """
    return nn.Sequential(*(part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())))


def towers(width: int, outputs: Sequence[int]) -> nn.ModuleList:
    """What only one task uses, at the end: a hidden layer and the output, for each task.

    Args:
        width: of the features.
        outputs: how many numbers each task predicts.
    """
    return nn.ModuleList(nn.Sequential(*features(width, TOWER), nn.Linear(TOWER, n)) for n in outputs)


class Gate(nn.Module):
    """Mixes the features of experts, by weights that depend on the input.

    Args:
        inputs: width of the input.
        experts: how many there are.
    """

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__()
        self.scores = nn.Linear(inputs, experts, bias=False)

    def forward(self, inputs: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """[B, width], from the input [B, inputs] and the features of each expert, [B, width]."""
        weights = self.scores(inputs).softmax(1)
        return torch.einsum("be,ebw->bw", weights, torch.stack(list(experts)))
