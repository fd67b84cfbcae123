"""GradVac."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.aggregation._random_order import RandomOrder
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class GradVac(RandomOrder, SolvedAggregator):
    """Turns each task's gradient towards those that it is less aligned with than usual, then sums the results.

    GradVac works like PCGrad, with another target: where the cosine of two gradients is below its running mean, it is
    raised to that mean. The running means start at zero. Wang et al., "Gradient Vaccine: Investigating and Improving
    Multi-task Optimization in Massively Multilingual Models" (ICLR 2021), Algorithm 1. The running mean of every pair
    is updated, not only that of a conflicting pair.

    Args:
        beta: how much of a pair's new cosine enters its running mean, 0 to 1.
        order: in which order each gradient is compared with the others. "random" draws a uniformly random order for
            each gradient at each call; "fixed" is ascending.
        generator: the generator of the random orders, on the gradients' device. `state_dict()` saves its state. None:
            torch's global generator.

    Raises:
        ValueError: `beta` or `order` is not one of these.

    State: n * (n + 1) float64 numbers for each group. Cost: two reads of K * P and one write of P; the solve takes K^3
    operations. Scale-free.
    """

    paper = "Wang et al., ICLR 2021"
    keeps = "n x n cosines"
    reads = Reads.GRAM
    method = "gradvac"
    counts = ("decided_by_noise",)
    beta = Real(0, 1)

    def __init__(
        self,
        beta: float = 0.5,
        order: Literal["random", "fixed"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(order, generator)
        self.beta = beta

    def params(self, step: Step) -> dict[str, float]:
        """Beta, an absolute epsilon of 0, and the share of a norm below which a gradient is rounding alone."""
        return {"beta": self.beta, "eps": 0.0, "rtol": step.rtol or 0.0}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        return self.keys(gram, step)

    def state_shape(self, known: int) -> tuple[int, ...]:
        return (known + 1, known)  # a row that begins with the count, then the pairs' running means

    def extra_repr(self) -> str:
        return f"beta={self.beta}, order={self.order!r}"
