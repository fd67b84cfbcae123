"""MGDA."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mtlfast._settings import Choice, Or, Real, Whole
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step

NORMS = ("none", "l2", "loss", "loss+")


class MGDA(SolvedAggregator):
    """The shortest convex combination of the gradients: a direction that improves every task equally fast.

    The weights w are the point of the simplex with the least w^T G w. Desideri, "Multiple-gradient descent algorithm"
    (2012); Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS 2018). They are found
    exactly. The papers and other implementations stop Frank-Wolfe's algorithm early, which `epsilon` reproduces.

    Args:
        epsilon: None finds the optimum. A number runs Frank-Wolfe's algorithm from uniform weights, until the size of a
            step is below it.
        max_iters: the most steps that Frank-Wolfe's algorithm makes.
        norms: what each gradient is divided by while the weights are computed: "none", "l2" (its norm), "loss" (its
            loss) or "loss+" (both). The weights then apply to the gradients as they are.

    Raises:
        ValueError: an argument is not one of these. A call raises it if `norms` needs losses and there are none.

    Cost: two reads of K * P and one write of P; the solve takes about K^3 operations. Scale-free.
    """

    paper = "Sener and Koltun, NeurIPS 2018"
    method = "mgda"
    counts = ("unconverged",)
    epsilon = Or(Real(0, least_itself=False), None)
    max_iters = Whole(1)
    norms = Choice(*NORMS)

    def __init__(
        self,
        epsilon: float | None = None,
        max_iters: int = 100,
        norms: Literal["none", "l2", "loss", "loss+"] = "none",
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.max_iters = max_iters
        self.norms = norms

    def params(self, step: Step) -> dict[str, float]:
        """The end of Frank-Wolfe's algorithm, and what to divide by: 1 for norms plus 2 for losses."""
        return {"epsilon": self.epsilon or 0.0, "max_iters": self.max_iters, "norms": NORMS.index(self.norms)}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The losses, if the gradients are divided by them."""
        if self.norms in ("none", "l2"):
            return {}
        assert step.losses is not None
        return {"losses": step.losses.detach().expand(gram.shape[:-1])}

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses a step without losses if the gradients are divided by them."""
        super().check(step, jacobian)
        if step.losses is None and self.norms not in ("none", "l2"):
            raise ValueError(f"MGDA: norms is {self.norms!r} and losses is None, expected the tasks' losses")

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, max_iters={self.max_iters}, norms={self.norms!r}"
