"""What methods with an absolute norm share: they need to know what the losses were multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.aggregation._solved import SolvedAggregator, Step


class Unscaled(SolvedAggregator):
    """A method that is not scale-free, and is given by what the losses were multiplied."""

    def inputs(self, step: Step) -> list[Tensor]:
        """`loss_scale`, one number a group, if there is one.

        Raises:
            ValueError: it holds more than one number.
        """
        scale, groups = step.loss_scale, step.gram.shape[:-2]
        if scale is None:
            return []
        if not isinstance(scale, Tensor):
            return [step.gram.new_full((*groups, 1), scale)]
        if scale.numel() != 1:
            raise ValueError(f"{type(self).__name__}: loss_scale has shape {list(scale.shape)}, expected a number")
        return [scale.detach().to(step.gram.device, torch.float64).reshape(1).expand(*groups, 1)]
