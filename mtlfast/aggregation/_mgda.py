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

    The weights w on the simplex with the least w^T G w. Desideri, "Multiple-gradient descent algorithm" (2012); Sener
    and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS 2018). They are found exactly; the papers
    and peers stop Frank-Wolfe early, which `epsilon` reproduces.

    Args:
        epsilon: None: the optimum. Else Frank-Wolfe's algorithm from uniform weights, which stops at a step below this.
        max_iters: Frank-Wolfe's steps at most.
        norms: what each gradient is divided by before the weights are computed, which then apply to the gradients as
            they are: "none"; "l2", its norm; "loss", its loss; "loss+", both.

    Raises:
        ValueError: an argument is not one of these; at a call, `norms` reads losses and there are none.

    Cost: two reads of K * P, one write of P; about K^3 for the solve. Scale-free.
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
        """See the class."""
        super().__init__()
        self.epsilon = epsilon
        self.max_iters = max_iters
        self.norms = norms

    def params(self, step: Step) -> dict[str, float]:
        """Frank-Wolfe's end, and the norms as bits."""
        return {"epsilon": self.epsilon or 0.0, "max_iters": self.max_iters, "norms": NORMS.index(self.norms)}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The losses, where they are read."""
        if self.norms in ("none", "l2"):
            return {}
        assert step.losses is not None
        return {"losses": step.losses.detach().expand(gram.shape[:-1])}

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses a step without losses where they are read."""
        super().check(step, jacobian)
        if step.losses is None and self.norms not in ("none", "l2"):
            raise ValueError(f"MGDA: norms is {self.norms!r} and losses is None, expected the tasks' losses")

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"epsilon={self.epsilon}, max_iters={self.max_iters}, norms={self.norms!r}"
