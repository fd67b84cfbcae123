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
    """Removes from each task's gradient what conflicts with the other tasks' gradients, then sums the results.

    Each gradient is compared with the other tasks' original gradients one after another. Where the dot product is
    negative, the gradient loses its component along the other one. Yu et al., "Gradient Surgery for Multi-Task
    Learning" (NeurIPS 2020), Algorithm 1.

    Args:
        reduction: "sum" as in the paper, or "mean", which divides the sum by the number of present tasks.
        order: in which order each gradient is compared with the others. "random" draws a uniformly random order for
            each gradient at each call; "fixed" is ascending.
        generator: the generator of the random orders, on the gradients' device. `state_dict()` saves its state. None:
            torch's global generator.

    Raises:
        ValueError: `reduction` or `order` is not one of these.

    Cost: two reads of K * P and one write of P; the solve takes K^3 operations. Scale-free: a factor common to all
    losses changes no weight.

    Example:
        The gradients (1, 0) and (-1, 1) conflict. They become (0.5, 0.5) and (0, 1), whose sum is the direction.

        >>> import torch
        >>> from mtlfast.aggregation import PCGrad
        >>> PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
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
        """The reduction; and, as in the paper, that no gradient is compared with itself."""
        return {"mean": self.reduction == "mean", "itself": False}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        return self.keys(gram, step)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, order={self.order!r}"
