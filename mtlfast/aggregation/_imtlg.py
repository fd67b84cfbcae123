"""IMTL-G."""

from __future__ import annotations

from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class IMTLG(SolvedAggregator):
    """The direction that has the same projection on every task's gradient, whatever its length.

    w = v / sum v with v = G^+ d for the gradients' norms d: Quinton and Rey's form ("Jacobian Descent for
    Multi-Objective Optimization", 2024), which extends to gradients that depend on each other, of Liu et al., "Towards
    Impartial Multi-task Learning" (ICLR 2021). Where sum v is negative, on strongly conflicting gradients,
    the update ascends every task; where it is zero up to `rtol`, the update is zero.

    Precision: cond(G) = cond(J)^2. It is the unit gradients' condition that counts, so that tasks may differ in length
    by any factor; of float64 gradients, the largest error in 200 random cases beside singular values of J itself,
    relative to the largest weight:

    ==========================  =======  =======  =======  =======
    cond of the unit gradients     10      1e3      1e5      1e7
    error                         1e-14    9e-11     5e-7     4e-3
    ==========================  =======  =======  =======  =======

    Where unit gradients depend on each other up to `rtol`, the pseudo-inverse is that of G itself.

    Cost: two reads of K * P, one write of P; about K^3 for the solve, 50 times that where gradients depend on each
    other. Scale-free.
    """

    paper = "Liu et al., ICLR 2021"
    method = "imtlg"
    counts = ("unconverged", "decided_by_noise")

    def params(self, step: Step) -> dict[str, float]:
        """Which eigenvalues count as zero."""
        return {"rtol": step.rank_rtol}
