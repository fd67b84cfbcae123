"""MoDo and SDMGrad, whose weights come from the gradients of two independent batches."""

from __future__ import annotations

import math

from torch import Tensor

from mtlfast._settings import Real, Whole
from mtlfast._vectors import Vector
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class _TwoBatches(SolvedAggregator):
    """A method whose weights follow from the products J_1 J_2^T of two batches. Those of one batch would bias them."""

    reads = Reads.CROSS_GRAM
    state_fill = math.nan  # 1 / K, as soon as K is known

    def state_shape(self, known: int) -> tuple[int, ...]:
        """A weight for each task."""
        return (known,)


class MoDo(_TwoBatches):
    """Moves the weights by one projected gradient step on the products of two independent batches' gradients.

    With A = J_1 J_2^T and the projection P onto the simplex, the step is w = P(w - gamma (A w + rho w)). Chen et al.,
    "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance" (NeurIPS
    2023). `mtlfast.backward(losses, MoDo(), second=other_losses)` applies the weights to the mean of both batches'
    gradients. `weights(A)` gives them for those of a third batch.

    Args:
        gamma: the step size of the weights. gamma A depends on the size of the gradients, so MoDo is not scale-free:
            if the losses are multiplied by a `loss_scale`, pass it on.
        rho: the weight decay.

    Raises:
        ValueError: `gamma` is not positive, or `rho` is negative.
        TypeError: the method is called with the gradients of one batch.

    State: n float64 numbers for each group, which start as 1/K. Cost: two reads of 2 K * P, one write of P, and
    K^2 operations for the weights.
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

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The weights for the products without the loss scale, which multiplies the gradients of both batches."""
        return super().solve(gram if step.loss_scale is None else gram / step.loss_scale / step.loss_scale, step)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, rho={self.rho}"


class SDMGrad(_TwoBatches, HasPreferences):
    """Moves the weights by a few steps of descent with momentum on the products of two independent batches' gradients.

    A is J_1 J_2^T divided by the square of the mean norm, and P is the projection onto the simplex. The method repeats
    v = momentum v + A (w + lambda u), w = P(w - lr v) for n_iter steps, and returns (w + lambda u) / (1 + lambda). Xiao
    et al., "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms" (NeurIPS 2023).
    `mtlfast.backward(losses, SDMGrad(), second=other_losses)` applies the weights to the mean of both batches'
    gradients. `weights(J_1 @ J_2.T)` gives them for those of a third batch.

    Args:
        lr: the step size of the weights.
        momentum: the momentum of the descent, 0 to 1.
        n_iter: the number of steps in a call.
        lambda_: how much the preferred direction counts.
        pref_vector: [n], the preferences u. None: 1/K each.

    Raises:
        ValueError: an argument is outside of its range.
        TypeError: the method is called with the gradients of one batch.

    State: n float64 numbers for each group, which start as 1/K. Cost: two reads of 2 K * P, one write of P, and
    n_iter K^2 operations for the weights. Scale-free.
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
