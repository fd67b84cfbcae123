"""FairGrad."""

from __future__ import annotations

from mtlfast._settings import Real
from mtlfast.aggregation._loss_scale import NeedsLossScale
from mtlfast.aggregation._step import Step


class FairGrad(NeedsLossScale):
    """Shares the progress among the tasks by alpha-fairness.

    The gain of task i is (G w)_i, the dot product of its gradient and the update. The weights w > 0 solve (G w)_i =
    w_i^(-1 / alpha), up to a residual of 1e-10. Ban and Ji, "Fair Resource Allocation in Multi-Task Learning" (ICML
    2024), Equation 4. If a convex combination of the gradients is zero up to `rtol`, these equations have no solution.
    The weights are then MGDA's, whose update is zero, and `diagnostics()` counts the step.

    Args:
        alpha: 1 gives proportional fairness, as in Nash-MTL; 2 minimises the potential delay; a large value favours the
            task with the smallest gain; 0 gives the weights 1/K. Above 30 and below 0.05 the solve takes hundreds of
            iterations if the norms of the gradients differ by a factor of 1e6.

    Raises:
        ValueError: `alpha` is negative.

    Not scale-free: the update grows like the gradients' norm to the power (alpha - 1) / (alpha + 1). With `loss_scale`
    the method computes the update for the losses without that factor, then multiplies the update by it.

    Cost: two reads of K * P and one write of P; the solve takes about 3 K^3 operations.
    """

    paper = "Ban and Ji, ICML 2024"
    method = "fairgrad"
    counts = ("unconverged", "decided_by_noise")
    alpha = Real(0)

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def params(self, step: Step) -> dict[str, float]:
        """The power, and the share of the largest eigenvalue below which one counts as zero."""
        return {"alpha": self.alpha, "rtol": step.rank_rtol}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
