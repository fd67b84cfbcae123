"""Norm balancing: aggregators whose weights depend on the gradients' norms alone."""

from __future__ import annotations

from mtlfast._settings import Or, Real
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._loss_scale import NeedsLossScale
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step
from mtlfast.aggregation._typical_norm import TypicalNorm, check_typical_norm, typical_norm


class NormBalance(SolvedAggregator):
    """Scales every task's gradient to one length, then sums the results: w_i = t / |g_i|.

    A zero gradient stays zero.

    Args:
        target: t, the "mean", "geometric" mean, "harmonic" mean, "min", "max" or "median" of the norms that are not
            zero. An index instead names the task whose norm t is; if that task is absent, the first present task takes
            its place.

    Raises:
        ValueError: `target` is not one of these; at a call, there is no such task.

    Cost: two reads of K * P, of which the first computes the norms, and one write of P. Scale-free.
    """

    method = "norm_balance"
    reads = Reads.NORMS
    target = TypicalNorm()

    def __init__(self, target: str | int = "mean") -> None:
        super().__init__()
        self.target = target

    def params(self, step: Step) -> dict[str, float]:
        target, task = typical_norm(self.target)
        return {"target": target, "task": task}

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if `target` is the index of a task that does not exist."""
        super().check(step, jacobian)
        check_typical_norm(self, self.target, step)

    def extra_repr(self) -> str:
        return f"target={self.target!r}"


class ClipNorm(NeedsLossScale):
    """Clips each task's gradient to a length, then sums the results: w_i = min(1, t / |g_i|).

    Args:
        max_norm: t, a number above 0, or "mean" for the mean norm of the gradients that are not zero. A number is the
            norm of a gradient without the factor `loss_scale`.

    Raises:
        ValueError: `max_norm` is neither.

    Cost: two reads of K * P, of which the first computes the norms, and one write of P. Scale-free with "mean".
    """

    method = "clip_norm"
    reads = Reads.NORMS
    max_norm = Or(Real(0, least_itself=False), "mean")

    def __init__(self, max_norm: float | str = "mean") -> None:
        super().__init__()
        self.max_norm = max_norm

    def params(self, step: Step) -> dict[str, float]:
        return {"max_norm": -1.0 if isinstance(self.max_norm, str) else self.max_norm}

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm!r}"


class CrossNorm(SolvedAggregator):
    """Scales each of two tasks' gradients to the length of the other, then sums the results.

    So the task with the shorter gradient leads. If one gradient is zero, the update is zero. A task whose partner is
    absent keeps its gradient.

    Raises:
        ValueError: at a call, there are more than two tasks.

    Cost: two reads of K * P, of which the first computes the norms, and one write of P. Scale-free.
    """

    method = "cross_norm"
    reads = Reads.NORMS

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if there are more than two tasks."""
        super().check(step, jacobian)
        if step.num_tasks > 2:
            raise ValueError(f"CrossNorm: got {step.num_tasks} tasks, expected at most 2")

    def params(self, step: Step) -> dict[str, float]:
        return {}


class InverseNorm(SolvedAggregator):
    """Weighs each task by the inverse of its gradient's norm. The weights add up to 1.

    So each task contributes the same length, which is the harmonic mean of the norms divided by K. A zero gradient has
    the weight 0.

    Cost: two reads of K * P, of which the first computes the norms, and one write of P. Scale-free.
    """

    method = "inverse_norm"
    reads = Reads.NORMS

    def params(self, step: Step) -> dict[str, float]:
        return {}
