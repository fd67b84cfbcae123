"""What methods with an absolute norm share: they need to know what the losses were multiplied by."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.aggregation._solved import SolvedAggregator, Step


class Unscaled(SolvedAggregator):
    """A method that is not scale-free, and is given by what the losses were multiplied."""

    def inputs(self, step: Step) -> dict[str, Tensor]:
        """`loss_scale`, one number a group, if there is one.

        Raises:
            ValueError: it holds more than one number.
        """
        scale, others = step.loss_scale, super().inputs(step)
        if scale is None:
            return others
        groups = step.gram.shape[:-2]
        if not isinstance(scale, Tensor):
            return {**others, "loss_scale": step.gram.new_full(groups, scale)}
        if scale.numel() != 1:
            raise ValueError(f"{type(self).__name__}: loss_scale has shape {list(scale.shape)}, expected a number")
        return {**others, "loss_scale": scale.detach().to(step.gram.device, torch.float64).reshape(()).expand(groups)}
