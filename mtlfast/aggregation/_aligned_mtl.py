"""Aligned-MTL."""

from __future__ import annotations

from typing import Literal

from mtlfast._settings import Choice
from mtlfast._vectors import Vector
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step

SCALE_MODES = ("min", "median", "rmse")


class AlignedMTL(HasPreferences):
    """Replaces the Jacobian's singular values by equal ones, so that no direction among the gradients dominates.

    The Gram matrix has the eigenvalues l_i and eigenvectors u_i. The weights are w = sqrt(s) sum_i l_i^(-1/2) u_i
    (u_i . p), where the sum runs over the eigenvalues above `rtol` times the largest. Senushkin et al., "Independent
    Component Alignment for Multi-Task Learning" (CVPR 2023), Algorithm 1.

    Args:
        pref_vector: [n], p, how much each task counts. None: 1/K each.
        scale_mode: s, the square of the singular value that all get. "min" takes the smallest, "median" the lower
            median, and "rmse" the mean of the squares.

    Raises:
        ValueError: `pref_vector` does not have one dimension, or `scale_mode` is not one of these.

    Precision: the solver sees G, whose condition number is the square of J's. The table shows, for float64 gradients,
    the largest error in 200 random cases relative to the largest weight. It compares with weights from a singular value
    decomposition of J itself.

    ========  =======  =======  =======  =======
    cond(J)      10      1e3      1e5      1e7
    error       6e-15    8e-11     2e-7     1e-3
    ========  =======  =======  =======  =======

    The method treats singular values below a share of the largest as zero. For float32 gradients the share is
    3.2e-7 sqrt(K), and in `weights(gram)` without `rtol` it is sqrt(K) / 1000.

    Cost: two reads of K * P, one write of P; about 40 K^3 for the solve. Scale-free.
    """

    paper = "Senushkin et al., CVPR 2023"
    method = "aligned_mtl"
    counts = ("unconverged", "decided_by_noise")
    scale_mode = Choice(*SCALE_MODES)

    def __init__(self, pref_vector: Vector | None = None, scale_mode: Literal["min", "median", "rmse"] = "min") -> None:
        super().__init__(pref_vector)
        self.scale_mode = scale_mode

    def params(self, step: Step) -> dict[str, float]:
        """The eigenvalue that all get, and the share of the largest below which one counts as zero."""
        return {"scale_mode": SCALE_MODES.index(self.scale_mode), "rtol": step.rank_rtol}

    def extra_repr(self) -> str:
        return f"pref_vector={self.pref_vector}, scale_mode={self.scale_mode!r}"
