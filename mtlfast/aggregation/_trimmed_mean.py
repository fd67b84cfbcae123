"""Trimmed mean and median, element by element."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Self

from mtlfast import ops
from mtlfast._settings import Whole
from mtlfast.aggregation._base import Aggregator
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._step import Step
from mtlfast.task_gradients import TaskGradients


class TrimmedMean(Aggregator):
    """The mean of each element's gradients without the least and the largest ones.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (ICML 2018), Definition 2.

    Args:
        trim_number: how many of the least and how many of the largest gradients of each element are left out.

    Raises:
        ValueError: `trim_number` is no such number. A call raises it if there are not at least 2 trim_number + 1 tasks.

    An element for which a gradient is inf or NaN is NaN, also if that gradient would be left out.

    Cost: one read of K * P and one write of P for up to 64 tasks; with more, plain PyTorch sorts them. Scale-free.
    """

    paper = "Yin et al., ICML 2018"
    by_element = True
    trim_number = Whole(0)

    def __init__(self, trim_number: int) -> None:
        super().__init__()
        self.trim_number = trim_number

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """The mean without the least and the largest gradient if there are at least three tasks, else the mean."""
        return cls(trim_number=1 if num_tasks >= 3 else 0)

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses fewer tasks than are left out."""
        super().check(step, jacobian)
        if step.num_tasks <= 2 * self.trim_number:
            raise ValueError(
                f"TrimmedMean: got {step.num_tasks} tasks, expected at least {2 * self.trim_number + 1} for "
                f"trim_number={self.trim_number}"
            )

    def aggregate(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> None:
        """Writes the means."""
        ops.trimmed_mean(grads, self.trim_number, out)

    def extra_repr(self) -> str:
        return f"trim_number={self.trim_number}"


class Median(Aggregator):
    """The median of each element's gradients: for an even number of tasks the mean of the two middle ones.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (ICML 2018), Definition 1.

    An element for which a gradient is inf or NaN is NaN.

    Cost: one read of K * P and one write of P for up to 64 tasks; with more, plain PyTorch sorts them. Scale-free.
    """

    paper = "Yin et al., ICML 2018"
    by_element = True

    def aggregate(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> None:
        """Writes the medians."""
        ops.trimmed_mean(grads, (grads.num_tasks - 1) // 2, out)
