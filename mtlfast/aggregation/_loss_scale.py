"""The base class of methods whose weights depend on the size of the gradients, so that they need the loss scale."""

from __future__ import annotations

from torch import Tensor

from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step, scale_on


class NeedsLossScale(SolvedAggregator):
    """A method whose weights change when all losses are multiplied by one factor.

    It is therefore told that factor, the loss scale, and undoes it.
    """

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The base class's inputs; and the loss scale, one number for each group, if the step has one."""
        others = super().inputs(gram, step)
        if step.loss_scale is None:
            return others
        return {**others, "loss_scale": scale_on(step, gram.device).expand(gram.shape[:-2])}
