"""IMTL-G."""

from __future__ import annotations

from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class IMTLG(SolvedAggregator):
    """Finds the direction that has the same projection on every task's gradient, however long the gradients are.

    The weights are w = v / sum(v) with v = G^+ d, where d are the gradients' norms and G^+ is the pseudo-inverse. This
    is Quinton and Rey's form ("Jacobian Descent for Multi-Objective Optimization", 2024) of Liu et al., "Towards
    Impartial Multi-task Learning" (ICLR 2021); it also covers linearly dependent gradients. sum(v) can be negative if
    the gradients conflict strongly, and the update then makes every task worse. If sum(v) is zero up to `rtol`, the
    update is zero.

    Precision: the solver sees G, whose condition number is the square of J's. Only the condition of the unit gradients
    counts, so that the gradients may differ in length by any factor. The table shows, for float64 gradients, the
    largest error in 200 random cases relative to the largest weight. It compares with weights from the singular values
    of J itself.

    ==========================  =======  =======  =======  =======
    cond of the unit gradients     10      1e3      1e5      1e7
    error                         1e-14    9e-11     5e-7     4e-3
    ==========================  =======  =======  =======  =======

    If the unit gradients are linearly dependent up to `rtol`, the pseudo-inverse is that of G itself.

    Cost: two reads of K * P and one write of P; the solve takes about K^3 operations, or 50 times that if the gradients
    are linearly dependent. Scale-free.
    """

    paper = "Liu et al., ICLR 2021"
    method = "imtlg"
    counts = ("unconverged", "decided_by_noise")

    def params(self, step: Step) -> dict[str, float]:
        """The share of the largest eigenvalue below which one counts as zero."""
        return {"rtol": step.rank_rtol}
