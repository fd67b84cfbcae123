"""MoDo and SDMGrad: weights from two independent batches' gradients."""

from __future__ import annotations

import math

from mtlfast._settings import Real, Whole
from mtlfast._vectors import Vector
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class _TwoBatches(SolvedAggregator):
    """Its `weights` take the cross-Gram matrix J_1 J_2^T; one batch's gradients alone would bias them."""

    reads = Reads.CROSS_GRAM
    state_fill = math.nan  # 1 / K, as soon as K is known

    def state_shape(self, known: int) -> tuple[int, ...]:
        """Each task's weight."""
        return (known,)


class MoDo(_TwoBatches):
    """One projected gradient step of the weights on the products of two independent batches' gradients.

    w = P(w - gamma (A w + rho w)) with A = J_1 J_2^T and P the projection onto the simplex. Chen et al., "Three-Way
    Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance" (NeurIPS 2023).
    `weights(A)` gives them; the update is theirs on a third batch, or on the mean of the two.

    Args:
        gamma: step size of the weights. The gradients' scale enters: gamma A is not scale-free.
        rho: weight decay.

    Raises:
        ValueError: `gamma` is not positive or `rho` negative; TypeError: one batch's gradients are given.

    State: n float64 numbers a group, from 1/K each. Cost: K^2.
    """

    paper = "Chen et al., NeurIPS 2023"
    keeps = "n weights"
    method = "modo"
    gamma = Real(0, least_itself=False)
    rho = Real(0)

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        self.rho = rho

    def params(self, step: Step) -> dict[str, float]:
        return {"gamma": self.gamma, "rho": self.rho}

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, rho={self.rho}"


class SDMGrad(_TwoBatches, HasPreferences):
    """A few steps of momentum descent of the weights on the products of two independent batches' gradients.

    On A = J_1 J_2^T over the mean norm's square: v = momentum v + A (w + lambda u), w = P(w - lr v), n_iter times;
    then (w + lambda u) / (1 + lambda). Xiao et al., "Direction-oriented Multi-objective Learning: Simple and Provable
    Stochastic Algorithms" (NeurIPS 2023). `weights(A)` gives them, for the gradients of a third batch.

    Args:
        lr: step size of the weights.
        momentum: of their descent, 0 to 1.
        n_iter: steps a call.
        lambda_: how much the preferred direction counts.
        pref_vector: [n], the preferences u; None: 1/K.

    Raises:
        ValueError: an argument is outside of its range; TypeError: one batch's gradients are given.

    State: n float64 numbers a group, from 1/K each. Cost: n_iter K^2. Scale-free.
    """

    paper = "Xiao et al., NeurIPS 2023"
    keeps = "n weights"
    method = "sdmgrad"
    lr = Real(0, least_itself=False)
    momentum = Real(0, 1, most_itself=False)
    n_iter = Whole(1)
    lambda_ = Real(0)

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: Vector | None = None,
    ) -> None:
        super().__init__(pref_vector)
        self.lr = lr
        self.momentum = momentum
        self.n_iter = n_iter
        self.lambda_ = lambda_

    def params(self, step: Step) -> dict[str, float]:
        return {"lr": self.lr, "momentum": self.momentum, "n_iter": self.n_iter, "lambda_": self.lambda_}

    def extra_repr(self) -> str:
        return (
            f"lr={self.lr}, momentum={self.momentum}, n_iter={self.n_iter}, lambda_={self.lambda_}, "
            f"pref_vector={self.pref_vector}"
        )
