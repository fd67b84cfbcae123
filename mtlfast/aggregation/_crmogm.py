"""CR-MOGM."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._by_task import put, take
from mtlfast._settings import Real
from mtlfast._vectors import Vector, vector
from mtlfast.aggregation._fixed import masked
from mtlfast.aggregation._gram_aggregator import GramAggregator
from mtlfast.aggregation._grouped_state import GroupedState
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._mgda import MGDA
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import grown
from mtlfast.aggregation._step import Step


class CRMOGM(GroupedState):
    """Smooths the weights of another aggregator over the steps: w = alpha w + (1 - alpha) w'.

    Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond" (NeurIPS 2022).

    Args:
        aggregator: the aggregator whose weights w' are smoothed.
        alpha: how much of the old weights is kept, 0 to 1. It may be set between steps.
        initial_weights: [n], the weights before the first step. None: the first weights that the aggregator gives a
            task.

    Raises:
        ValueError: `alpha` is outside of its range, or `initial_weights` is not a vector of finite numbers.
        TypeError: `aggregator` is not a `GramAggregator`.

    State: n float64 numbers for each group, and the aggregator's state. A step that is not finite changes nothing.
    Cost: that of the aggregator.
    """

    paper = "Zhou et al., NeurIPS 2022"
    keeps = "n weights and its method's state"
    alpha = Real(0, 1)
    first_weights: Tensor | None

    def __init__(self, aggregator: GramAggregator, alpha: float = 0.9, initial_weights: Vector | None = None) -> None:
        super().__init__()
        if not isinstance(aggregator, GramAggregator):
            raise TypeError(
                f"CRMOGM: aggregator is a {type(aggregator).__name__}, expected one with weights (a GramAggregator)"
            )
        self.aggregator = aggregator
        self.alpha = alpha
        given = None if initial_weights is None else vector(self, "initial_weights", initial_weights, size="K")
        self.register_buffer("first_weights", given)

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """CR-MOGM of MGDA."""
        return cls(MGDA())

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """What the aggregator reads."""
        return self.aggregator.reads

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if the aggregator does, or if the tasks are not those that have initial weights."""
        self.aggregator.check(step, jacobian)
        super().check(step, jacobian)
        if self.first_weights is not None:
            self.check_entries("first_weights", "weights", step)

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The smoothed weights, [..., K] float64."""
        if step.groups is not None:
            self.keep_groups(step)
        new = self.aggregator.solve(gram, step)
        present = step.present
        known = max(present, default=-1) + 1
        if self.state is not None:
            known = max(known, self.state.shape[-1])
        state = grown(self, self.state, gram.shape[:-2], (known,), math.nan, gram.device)
        old = take(state, present)
        first = new if self.first_weights is None else self.entries("first_weights", gram, step)
        smoothed = self.alpha * torch.where(old.isnan(), first, old) + (1 - self.alpha) * new
        finite = new.isfinite().all(dim=-1, keepdim=True)
        moved = finite if step.mask is None else finite & step.mask
        if step.training:
            self.state = state
            put(state, present, torch.where(moved, smoothed, old))
        return masked(torch.where(finite, smoothed, torch.nan), step)

    def reset(self) -> None:
        """Forgets the smoothed weights and the aggregator's state."""
        super().reset()
        self.aggregator.reset()

    def diagnostics(self) -> dict[str, int]:
        return self.aggregator.diagnostics()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
