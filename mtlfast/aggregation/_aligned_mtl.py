"""Aligned-MTL."""

from __future__ import annotations

from typing import Literal

from mtlfast._settings import Choice
from mtlfast._vectors import Vector
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step

SCALE_MODES = ("min", "median", "rmse")


class AlignedMTL(HasPreferences):
    """Makes the Jacobian's singular values equal: no direction in the space of the gradients dominates another.

    With G = sum_i l_i u_i u_i^T: w = sqrt(s) sum_i l_i^(-1/2) u_i (u_i p) over the eigenvalues l_i above `rtol` times
    the largest. Senushkin et al., "Independent Component Alignment for Multi-Task Learning" (CVPR 2023), Algorithm 1.

    Args:
        pref_vector: [n], p, how much each task counts; None: 1/K.
        scale_mode: s, the square of the singular value that all get: "min", the smallest one; "median", the lower
            median; "rmse", the mean of the squares.

    Raises:
        ValueError: `pref_vector` has not one dimension, or `scale_mode` is not one of these.

    Precision: cond(G) = cond(J)^2, and that many digits are lost; of float64 gradients, the largest error in 200 random
    cases beside a singular value decomposition of J itself, relative to the largest weight:

    ========  =======  =======  =======  =======
    cond(J)      10      1e3      1e5      1e7
    error       6e-15    8e-11     2e-7     1e-3
    ========  =======  =======  =======  =======

    Of float32 gradients `rtol` counts directions with cond(J) above 1000 / sqrt(K) as zero.

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
        """Which eigenvalue, and which ones count."""
        return {"scale_mode": SCALE_MODES.index(self.scale_mode), "rtol": step.rank_rtol}

    def extra_repr(self) -> str:
        return f"pref_vector={self.pref_vector}, scale_mode={self.scale_mode!r}"
