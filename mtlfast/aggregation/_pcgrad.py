"""PCGrad."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.aggregation._base import GramAggregator


class PCGrad(GramAggregator):
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

    def __init__(
        self,
        reduction: Literal["sum", "mean"] = "sum",
        order: Literal["random", "fixed"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.reduction = reduction
        self.order = order
        self.generator = generator

    @property
    def reduction(self) -> str:
        """How the projected gradients become one: "sum" or "mean"."""
        return self._reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        if value not in ("sum", "mean"):
            raise ValueError(f"PCGrad: reduction is {value!r}, expected 'sum' or 'mean'")
        self._reduction = value

    @property
    def order(self) -> str:
        """In which order a gradient meets the others: "random" or "fixed"."""
        return self._order

    @order.setter
    def order(self, value: str) -> None:
        if value not in ("random", "fixed"):
            raise ValueError(f"PCGrad: order is {value!r}, expected 'random' or 'fixed'")
        self._order = value

    def weights(self, gram: Tensor, **context: Any) -> Tensor:
        """[..., K] float64: how much of each task's gradient is left, summed over the projected gradients."""
        inputs = []
        if self.order == "random":
            inputs = [torch.rand(gram.shape, generator=self.generator, dtype=gram.dtype, device=gram.device)]
        return ops.solve(gram, "pcgrad", params=[float(self.reduction == "mean")], inputs=inputs)

    def get_extra_state(self) -> Tensor | None:
        """The generator's state, for `state_dict()`."""
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Restores the generator, from `load_state_dict()`."""
        if self.generator is not None and state is not None:
            self.generator.set_state(state)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"reduction={self.reduction!r}, order={self.order!r}"
