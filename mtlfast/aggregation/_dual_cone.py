"""UPGrad and DualProj: projections onto the cone of directions that no task minds."""

from __future__ import annotations

from mtlfast._settings import Real
from mtlfast._vectors import Vector
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step


class _DualCone(HasPreferences):
    counts = ("unconverged",)
    reg_eps = Real(0)
    _of_trace = False  # is the regularisation relative to G's trace, as TorchJD's, in place of each gradient's length?

    def __init__(self, pref_vector: Vector | None = None, reg_eps: float = 1e-4) -> None:
        """See the class."""
        super().__init__(pref_vector)
        self.reg_eps = reg_eps

    def params(self, step: Step) -> dict[str, float]:
        """The regularisation."""
        return {"reg_eps": self.reg_eps, "of_trace": self._of_trace}

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"pref_vector={self.pref_vector}, reg_eps={self.reg_eps}"


class UPGrad(_DualCone):
    """Projects each task's gradient onto the cone of directions that no task minds, then adds the projections up.

    The cone holds the d with d g_j >= 0 for every task j. Quinton and Rey, "Jacobian Descent for Multi-Objective
    Optimization" (2024).

    Args:
        pref_vector: [n], what each task's gradient is multiplied by first; None: 1/K.
        reg_eps: what each gradient's own G_ii is multiplied by and added to it. With 0 no task is ever harmed; the
            default keeps weights small where gradients are nearly opposite, and may harm one a little there: two
            gradients at an angle of t, whatever their lengths, have a cosine to the direction of at least
            -reg_eps |cos t| / sin t.

    Raises:
        ValueError: `pref_vector` has not one dimension, or `reg_eps` is negative.

    Cost: two reads of K * P, one write of P; about K^4 / 10 for the solve. Scale-free.
    """

    paper = "Quinton and Rey, 2024"
    method = "upgrad"


class DualProj(_DualCone):
    """Projects the mean gradient onto the cone of directions that no task minds.

    The cone holds the d with d g_j >= 0 for every task j. Lopez-Paz and Ranzato, "Gradient Episodic Memory for
    Continual Learning" (NeurIPS 2017), Equation 11.

    Args:
        pref_vector: [n], the weights of the combination that is projected; None: 1/K.
        reg_eps: what each gradient's own G_ii is multiplied by and added to it; see UPGrad.

    Raises:
        ValueError: `pref_vector` has not one dimension, or `reg_eps` is negative.

    Cost: two reads of K * P, one write of P; about K^3 for the solve. Scale-free.
    """

    paper = "Lopez-Paz and Ranzato, NeurIPS 2017"
    method = "dualproj"
