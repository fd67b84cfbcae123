"""`Random`."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.weighting._base import LossWeighting


class Random(LossWeighting):
    """Random positive weights that add up to 1, drawn at each call: the softmax of K standard normal numbers.

    torch's global generator of the losses' device draws them, in the losses' dtype. After `.eval()` each weight is its
    mean, 1/K. Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning" (TMLR
    2022), Algorithm 2. Also called `RandomLossWeighting`.
    """

    paper = "Lin et al., TMLR 2022"
    draws = True

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The sum of the losses times their weights."""
        if not self.training:
            return values.mean()
        return (torch.randn_like(values.detach()).softmax(dim=0) * values).sum()
