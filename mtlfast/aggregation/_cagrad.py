"""CAGrad."""

from __future__ import annotations

from typing import Literal

from typing_extensions import Self

from mtlfast._settings import Choice, Real
from mtlfast._vectors import Vector
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step


class CAGrad(HasPreferences):
    """Finds the direction near the mean gradient that improves the worst task the most.

    g_0 is the mean gradient, or the combination that `pref_vector` asks for. Among the directions d with |d - g_0| <= c
    |g_0|, CAGrad takes the one whose smallest dot product with a task's gradient is largest. Liu et al.,
    "Conflict-Averse Gradient Descent for Multi-task Learning" (NeurIPS 2021), Algorithm 1; the problem is solved to the
    optimum. With c < 1 the direction is never zero. If a convex combination of the gradients is zero at the optimum,
    every direction that harms no task is as good, and CAGrad takes the one nearest to g_0.

    The direction is d = g_0 + c |g_0| g_w / |g_w|, where g_w = sum_i w_i g_i has weights w that add up to 1. With
    `clip` each w_i is at most task i's preference, and d is g_0 itself where nothing is left of g_w. Chen et al.,
    "Reward-free Alignment for Conflicting Objectives" (ICML 2026), do so in their method RACO. Where gradients depend
    on each other several w are optimal, and the clipped direction follows from the one that the solver finds.

    Args:
        c: the radius of the ball around the mean gradient, relative to the mean gradient's norm. 0 gives the mean
            gradient itself.
        rescale: 0 leaves the direction as it is, as in the paper; 1 divides it by 1 + c^2, as the paper's code does;
            2 divides it by 1 + c.
        norm_eps: the direction is zero where the weighted gradient's norm, relative to the square root of G's trace, is
            at most this. TorchJD uses 1e-4.
        pref_vector: [n], the weight of each task in g_0, at least 0. None: 1/K, so that g_0 is the mean gradient.
        clip: whether each weight w_i is at most task i's entry of `pref_vector`, which then should add up to 1.

    Raises:
        ValueError: `c`, `norm_eps` or an entry of `pref_vector` is negative, or `rescale` or `clip` is none of these.

    Cost: two reads of K * P and one write of P; the solve takes some ten times K^3 operations. Scale-free.
    """

    paper = "Liu et al., NeurIPS 2021"
    method = "cagrad"
    counts = ("unconverged", "decided_by_noise")
    c = Real(0)
    rescale = Choice(0, 1, 2)
    norm_eps = Real(0)
    clip = Choice(False, True)
    least_preference = (0.0, True)

    def __init__(
        self,
        c: float,
        rescale: Literal[0, 1, 2] = 0,
        norm_eps: float = 0.0,
        pref_vector: Vector | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(pref_vector)
        self.c = c
        self.rescale = rescale
        self.norm_eps = norm_eps
        self.clip = clip

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
            "clip": self.clip,
        }

    def extra_repr(self) -> str:
        """The settings; `pref_vector` and `clip` if they are used."""
        preferences = "" if self.pref_vector is None else f", pref_vector={self.pref_vector}"
        clip = ", clip=True" if self.clip else ""
        return f"c={self.c}, rescale={self.rescale}, norm_eps={self.norm_eps}{preferences}{clip}"
