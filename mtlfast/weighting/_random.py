"""Random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.weighting._base import LossWeighting


class Random(LossWeighting):
    """Random weights that add up to 1, drawn anew at each call: the softmax of K standard normal numbers.

    Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning" (TMLR 2022),
    Algorithm 2. Drawn by torch's global generator of the losses' device, in the losses' dtype; after `.eval()` nothing
    is drawn, and each weight is what it is on average, 1/K. Also called `RandomLossWeighting`.
    """

    paper = "Lin et al., TMLR 2022"

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The sum of the losses times their weights."""
        if not self.training:
            return values.mean()
        return (torch.randn_like(values.detach()).softmax(dim=0) * values).sum()
