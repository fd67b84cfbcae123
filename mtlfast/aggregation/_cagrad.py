"""CAGrad."""

from __future__ import annotations

from typing import Literal

from typing_extensions import Self

from mtlfast._settings import Choice, Real
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class CAGrad(SolvedAggregator):
    """Finds the direction near the mean gradient that improves the worst task the most.

    g_0 is the mean gradient. Among the directions d with |d - g_0| <= c |g_0|, CAGrad takes the one whose smallest dot
    product with a task's gradient is largest. Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning"
    (NeurIPS 2021), Algorithm 1; the problem is solved to the optimum. With c < 1 the direction is never zero. If a
    convex combination of the gradients is zero at the optimum, every direction that harms no task is as good, and
    CAGrad takes the one nearest to g_0.

    Args:
        c: the radius of the ball around the mean gradient, relative to the mean gradient's norm. 0 gives the mean
            gradient itself.
        rescale: 0 leaves the direction as it is, as in the paper; 1 divides it by 1 + c^2, as the paper's code does;
            2 divides it by 1 + c.
        norm_eps: the direction is zero where the weighted gradient's norm, relative to the square root of G's trace, is
            at most this. TorchJD uses 1e-4.

    Raises:
        ValueError: `c` or `norm_eps` is negative, or `rescale` is not one of these.

    Cost: two reads of K * P and one write of P; the solve takes some ten times K^3 operations. Scale-free.
    """

    paper = "Liu et al., NeurIPS 2021"
    method = "cagrad"
    counts = ("unconverged", "decided_by_noise")
    c = Real(0)
    rescale = Choice(0, 1, 2)
    norm_eps = Real(0)

    def __init__(self, c: float, rescale: Literal[0, 1, 2] = 0, norm_eps: float = 0.0) -> None:
        super().__init__()
        self.c = c
        self.rescale = rescale
        self.norm_eps = norm_eps

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """CAGrad with c = 0.5."""
        return cls(c=0.5)

    def params(self, step: Step) -> dict[str, float]:
        return {
            "c": self.c,
            "rescale": self.rescale,
            "norm_eps": self.norm_eps,
            "rtol": (step.rtol or 0.0) / step.num_tasks,
        }

    def extra_repr(self) -> str:
        return f"c={self.c}, rescale={self.rescale}, norm_eps={self.norm_eps}"
