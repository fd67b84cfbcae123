"""ConFIG."""

from __future__ import annotations

from mtlfast._vectors import Vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step
from mtlfast.aggregation._typical_norm import TypicalNorm, check_typical_norm, typical_norm


class ConFIG(HasPreferences):
    """The direction at the same angle to every task's gradient, as long as the gradients' projections on it together.

    The direction is U^+ p for the unit gradients U. Liu et al., "ConFIG: Towards Conflict-free Training of Physics
    Informed Neural Networks" (ICLR 2025), Equation 2.

    Args:
        pref_vector: [n], p, the tasks' projections on the direction, relative to each other; None: all the same.
        length: "projection": the sum of the gradients' projections. Else the same with all gradients at one length,
            which is the "min", "max", "mean" (arithmetic), "geometric", "harmonic" or "median" norm of those that are
            not zero, or with an index that task's norm; an absent task's place is taken by the first present one.

    Raises:
        ValueError: `pref_vector` has not one dimension, `length` is not one of these; at a call, there is no such task.

    Precision: as IMTLG's, with errors of 3e-14, 1e-10, 1e-6 and 1e-2.

    Cost: two reads of K * P, one write of P; about K^3 for the solve, 40 times that where unit gradients depend on each
    other. Scale-free.
    """

    paper = "Liu et al., ICLR 2025"
    method = "config"
    counts = ("unconverged", "decided_by_noise")
    length = TypicalNorm("projection")

    def __init__(self, pref_vector: Vector | None = None, length: str | int = "projection") -> None:
        super().__init__(pref_vector)
        self.length = length

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses a length that is no task of the step's."""
        super().check(step, jacobian)
        check_typical_norm(self, self.length, step)

    def params(self, step: Step) -> dict[str, float]:
        """The length, and which eigenvalues count as zero."""
        length, task = typical_norm(self.length)
        return {"length": length, "task": task, "rtol": step.rank_rtol}

    def extra_repr(self) -> str:
        return f"pref_vector={self.pref_vector}, length={self.length!r}"
