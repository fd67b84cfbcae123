"""CAGrad."""

from __future__ import annotations

from typing import Literal

from typing_extensions import Self

from mtlfast._settings import Choice, Real
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class CAGrad(SolvedAggregator):
    """The direction near the mean gradient that improves the worst task the most.

    Of the directions d with |d - g_0| <= c |g_0|, g_0 the mean gradient, the one whose smallest product with a task's
    gradient is largest. Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning" (NeurIPS 2021),
    Algorithm 1, solved to the optimum. With c < 1 it is never zero. Where a combination of the gradients is zero at the
    optimum, all directions with which no task loses are as good: it is the one nearest to g_0.

    Args:
        c: radius of the ball around the mean gradient, relative to its norm; 0: the mean gradient.
        rescale: 0: none, as in the paper; 1: the direction over 1 + c^2, as its code does; 2: over 1 + c.
        norm_eps: for results as TorchJD's, which takes 1e-4: where the weighted gradient is at most this long, relative
            to the square root of G's trace, the update is zero.

    Raises:
        ValueError: `c` or `norm_eps` is negative, `rescale` not one of these.

    Cost: two reads of K * P, one write of P; some ten times K^3 for the solve. Scale-free.
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
        """With c = 0.5."""
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
