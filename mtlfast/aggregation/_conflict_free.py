"""ConFIG."""

from __future__ import annotations

from mtlfast._vectors import Vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step
from mtlfast.aggregation._typical_norm import TypicalNorm, check_typical_norm, typical_norm


class ConFIG(HasPreferences):
    """Finds the direction that has the same angle to every task's gradient.

    The length of the update is the sum of the gradients' projections on the direction. The direction is U^+ p, where
    the rows of U are the gradients divided by their norms, and U^+ is the pseudo-inverse. Liu et al., "ConFIG: Towards
    Conflict-free Training of Physics Informed Neural Networks" (ICLR 2025), Equation 2.

    Args:
        pref_vector: [n], p. The cosines between the direction and the gradients are in the ratio of these numbers.
            None: all the same.
        length: "projection" takes the gradients' projections as they are. Otherwise each gradient is scaled to one norm
            before it is projected. That norm is the "min", "max", "mean" (arithmetic), "geometric", "harmonic" or
            "median" of the norms that are not zero. An index instead names the task whose norm it is; if that task is
            absent, the first present task takes its place.

    Raises:
        ValueError: `pref_vector` does not have one dimension, or `length` is not one of these; at a call, there is no
            such task.

    Precision: as in the table of `IMTLG`, with errors of 3e-14, 1e-10, 1e-6 and 1e-2.

    Cost: two reads of K * P and one write of P; the solve takes about K^3 operations, or 40 times that if the unit
    gradients are linearly dependent. Scale-free.
    """

    paper = "Liu et al., ICLR 2025"
    method = "config"
    counts = ("unconverged", "decided_by_noise")
    length = TypicalNorm("projection")

    def __init__(self, pref_vector: Vector | None = None, length: str | int = "projection") -> None:
        super().__init__(pref_vector)
        self.length = length

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if `length` is the index of a task that does not exist."""
        super().check(step, jacobian)
        check_typical_norm(self, self.length, step)

    def params(self, step: Step) -> dict[str, float]:
        """The length, and the share of the largest eigenvalue below which one counts as zero."""
        length, task = typical_norm(self.length)
        return {"length": length, "task": task, "rtol": step.rank_rtol}

    def extra_repr(self) -> str:
        return f"pref_vector={self.pref_vector}, length={self.length!r}"
