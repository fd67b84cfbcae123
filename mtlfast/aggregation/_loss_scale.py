"""The base class of methods whose weights depend on the size of the gradients, so that they need the loss scale."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class NeedsLossScale(SolvedAggregator):
    """A method whose weights change when all losses are multiplied by one factor.

    It is therefore told that factor, the loss scale, and undoes it.
    """

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The base class's inputs; and the loss scale, one number for each group, if the step has one."""
        scale, others = step.loss_scale, super().inputs(gram, step)
        if scale is None:
            return others
        groups = gram.shape[:-2]
        if not isinstance(scale, Tensor):
            return {**others, "loss_scale": gram.new_full(groups, scale)}
        return {**others, "loss_scale": scale.detach().to(gram.device, torch.float64).reshape(()).expand(groups)}
