"""PCGrad."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtlfast._settings import Choice
from mtlfast.aggregation._random_order import RandomOrder
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class PCGrad(RandomOrder, SolvedAggregator):
    """Projects each task's gradient off those that it conflicts with, then sums them.

    Each gradient meets the other tasks' gradients in a random order; where their dot product is negative it loses its
    component along them. Yu et al., "Gradient Surgery for Multi-Task Learning" (NeurIPS 2020), Algorithm 1.

    Args:
        reduction: "sum" as in the paper, or "mean": divided by the number of present tasks.
        order: "random": a fresh uniformly random order for each gradient at each call. "fixed": ascending.
        generator: draws the orders, on the gradients' device; None: torch's global one. `state_dict()` holds it.

    Raises:
        ValueError: `reduction` or `order` is not one of these.

    Cost: two reads of K * P, one write of P; K^3 for the solve. Scale-free: multiplying all losses by a constant
    changes no weight.
    """

    paper = "Yu et al., NeurIPS 2020"
    reads = Reads.GRAM
    method = "pcgrad"
    reduction = Choice("sum", "mean")

    def __init__(
        self,
        reduction: Literal["sum", "mean"] = "sum",
        order: Literal["random", "fixed"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(order, generator)
        self.reduction = reduction

    def params(self, step: Step) -> dict[str, float]:
        """The reduction; as in the paper, no gradient meets itself."""
        return {"mean": self.reduction == "mean", "itself": False}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        return self.keys(gram, step)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, order={self.order!r}"
