"""What methods with an absolute norm share: they need to know what the losses were multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class Unscaled(SolvedAggregator):
    """A method that is not scale-free, and is given by what the losses were multiplied."""

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """`loss_scale`, one number a group, if there is one."""
        scale, others = step.loss_scale, super().inputs(gram, step)
        if scale is None:
            return others
        groups = gram.shape[:-2]
        if not isinstance(scale, Tensor):
            return {**others, "loss_scale": gram.new_full(groups, scale)}
        return {**others, "loss_scale": scale.detach().to(gram.device, torch.float64).reshape(()).expand(groups)}
