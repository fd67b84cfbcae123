"""What methods with an absolute norm share: they need to know what the losses were multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class Unscaled(SolvedAggregator):
    """A method that is not scale-free, and is given by what the losses were multiplied."""

    def inputs(self, gram: Tensor, step: Step) -> list[Tensor]:
        """`loss_scale`, one number a group, if there is one."""
        scale, groups = step.loss_scale, gram.shape[:-2]
        if scale is None:
            return []
        if not isinstance(scale, Tensor):
            return [gram.new_full((*groups, 1), scale)]
        return [scale.detach().to(gram.device, torch.float64).reshape(1).expand(*groups, 1)]
