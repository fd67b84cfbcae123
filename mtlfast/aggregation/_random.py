"""`Random`."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.aggregation._fixed import equal_weights, masked
from mtlfast.aggregation._gram_aggregator import GramAggregator
from mtlfast.aggregation._random_order import HasGenerator
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step


class Random(HasGenerator, GramAggregator):
    """Random positive weights that add up to 1, drawn at each call: the softmax of K standard normal numbers.

    Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning" (TMLR 2022),
    Algorithm 2.

    Args:
        generator: the generator of the weights, on the gradients' device. `state_dict()` saves its state. None: torch's
            global generator.

    Cost: one read of K * P and one write of P.
    """

    paper = "Lin et al., TMLR 2022"
    reads = Reads.NOTHING

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The weights [..., K] float64; in eval mode the expected ones, 1/K."""
        if not step.training:
            return equal_weights(gram, step)
        drawn = torch.randn(gram.shape[:-1], generator=self.generator, dtype=torch.float64, device=gram.device)
        if step.mask is not None:
            drawn = drawn.where(step.mask, -torch.inf)
        return masked(drawn.softmax(dim=-1), step)
