"""FairGrad."""

from __future__ import annotations

from mtlfast._settings import Real
from mtlfast.aggregation._loss_scale import NeedsLossScale
from mtlfast.aggregation._step import Step


class FairGrad(NeedsLossScale):
    """Shares progress among the tasks by alpha-fairness.

    The weights w > 0 with (G w)_i = w_i^(-1 / alpha), where G w are the tasks' gains. Ban and Ji, "Fair Resource
    Allocation in Multi-Task Learning" (ICML 2024), Equation 4; solved exactly (residual up to 1e-10). Where a
    combination of the gradients is zero up to `rtol`, there are no such weights: then they are MGDA's, whose update is
    zero there, and `diagnostics()` counts it.

    Args:
        alpha: 1: proportional fairness, Nash-MTL's; 2: the least potential delay; large: the worst task's gain; 0: 1/K
            each, without regard to fairness. Above 30, and below 0.05, steps where tasks' norms differ by 1e6 take
            hundreds of iterations.

    Raises:
        ValueError: `alpha` is negative.

    Not scale-free: the update grows as the gradients' length to the power (alpha - 1) / (alpha + 1). With `loss_scale`
    it is what it would be without that factor, times the factor.

    Cost: two reads of K * P, one write of P; about 3 K^3 for the solve.
    """

    paper = "Ban and Ji, ICML 2024"
    method = "fairgrad"
    counts = ("unconverged", "decided_by_noise")
    alpha = Real(0)

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def params(self, step: Step) -> dict[str, float]:
        """The power, and what counts as zero."""
        return {"alpha": self.alpha, "rtol": step.rank_rtol}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
