"""UPGrad and DualProj: projections onto the dual cone of the task gradients."""

from __future__ import annotations

from mtlfast._settings import Real
from mtlfast._vectors import Vector
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step


class _DualCone(HasPreferences):
    counts = ("unconverged",)
    reg_eps = Real(0)
    _of_trace = False  # whether reg_eps is relative to the trace of G, as in TorchJD, and not to each gradient's G_ii

    def __init__(self, pref_vector: Vector | None = None, reg_eps: float = 1e-4) -> None:
        super().__init__(pref_vector)
        self.reg_eps = reg_eps

    def params(self, step: Step) -> dict[str, float]:
        return {"reg_eps": self.reg_eps, "of_trace": self._of_trace}

    def extra_repr(self) -> str:
        return f"pref_vector={self.pref_vector}, reg_eps={self.reg_eps}"


class UPGrad(_DualCone):
    """Projects each task's gradient onto the dual cone of all task gradients, then takes the mean of the projections.

    The dual cone holds the directions d with d g_j >= 0 for every task j: a small step along them raises no task's
    loss. Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization" (2024).

    Args:
        pref_vector: [n], the weight of each task's projection in the sum of them. None: 1/K, their mean.
        reg_eps: the regularisation, relative to each gradient's own length: each squared norm on the
            diagonal of the Gram matrix is multiplied by 1 + reg_eps.
            With 0 no task's loss ever rises to first order. The default keeps the weights small where gradients are
            nearly opposite, and one task may lose a little there. For two gradients at an angle of t, the cosine
            between either and the direction is at least -reg_eps |cos t| / sin t.

    Raises:
        ValueError: `pref_vector` has not one dimension, or `reg_eps` is negative.

    Cost: two reads of K * P and one write of P; the solve takes about K^4 / 10 operations. Scale-free.

    Example:
        >>> import torch
        >>> from mtlfast.aggregation import UPGrad
        >>> UPGrad(reg_eps=0.0)(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.2500, 0.7500])
    """

    paper = "Quinton and Rey, 2024"
    method = "upgrad"


class DualProj(_DualCone):
    """Projects the mean gradient onto the dual cone of all task gradients.

    The dual cone holds the directions d with d g_j >= 0 for every task j: a small step along them raises no task's
    loss. Lopez-Paz and Ranzato, "Gradient Episodic Memory for
    Continual Learning" (NeurIPS 2017), Equation 11.

    Args:
        pref_vector: [n], the weights of the combination that is projected. None: 1/K.
        reg_eps: the regularisation, relative to each gradient's own length, as for UPGrad.

    Raises:
        ValueError: `pref_vector` has not one dimension, or `reg_eps` is negative.

    Cost: two reads of K * P and one write of P; the solve takes about K^3 operations. Scale-free.
    """

    paper = "Lopez-Paz and Ranzato, NeurIPS 2017"
    method = "dualproj"
