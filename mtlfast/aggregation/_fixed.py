"""Aggregators whose weights do not depend on the gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._vectors import Vector, vector
from mtlfast.aggregation._gram_aggregator import GramAggregator
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step


def masked(weights: Tensor, step: Step) -> Tensor:
    """Weights [..., K] with zeros for the tasks that the mask leaves out."""
    return weights if step.mask is None else weights.where(step.mask, 0)


def equal_weights(gram: Tensor, step: Step) -> Tensor:
    """Equal weights [..., K] that add up to 1 over the tasks that the mask does not leave out."""
    if step.mask is None:
        return gram.new_full(gram.shape[:-1], 1 / max(1, gram.shape[-1]))
    count = step.mask.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return masked((1 / count).expand(step.mask.shape), step)


class Sum(GramAggregator):
    """The sum of the task gradients, which is the gradient of `sum(losses)`.

    Cost: one read of K * P and one write of P.
    """

    reads = Reads.NOTHING

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """Ones, [..., K]."""
        return masked(gram.new_ones(gram.shape[:-1]), step)


class Mean(GramAggregator):
    """The mean of the present tasks' gradients.

    `mtlfast.backward` takes the mean for the shared parameters alone; a head keeps its task's whole gradient.

    Cost: one read of K * P and one write of P.
    """

    reads = Reads.NOTHING

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """1/K, [..., K]."""
        return equal_weights(gram, step)


class Constant(GramAggregator):
    """The sum of the task gradients with weights that the user gives. The weight of an absent task is not used.

    Args:
        weights: [n], one number for each task, as a tensor, an array or a list.

    Raises:
        ValueError: `weights` is not a vector of finite numbers.

    Cost: one read of K * P and one write of P. On a GPU, move the aggregator there first (`.to(device)`); otherwise the
    first step waits for the copy of the weights.
    """

    reads = Reads.NOTHING
    task_weights: Tensor

    def __init__(self, weights: Vector) -> None:
        super().__init__()
        if isinstance(weights, Tensor) and weights.dim() != 1:
            raise ValueError(f"Constant: weights have shape {list(weights.shape)}, expected [K]")
        self.register_buffer("task_weights", vector(self, "weights", weights, size="K"))

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """Weights from 0.5 to 1.5."""
        return cls(torch.linspace(0.5, 1.5, num_tasks))

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if the tasks are not those that have weights."""
        super().check(step, jacobian)
        self.check_entries("task_weights", "weights", step)

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The present tasks' weights, [..., K]."""
        return masked(self.entries("task_weights", gram, step), step)

    def extra_repr(self) -> str:
        return f"num_tasks={len(self.task_weights)}"
