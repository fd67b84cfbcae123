"""Krum and Multi-Krum."""

from __future__ import annotations

from typing_extensions import Self

from mtlfast._settings import Whole
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class Krum(SolvedAggregator):
    """The mean of those gradients that lie closest to their nearest others: outliers get no weight.

    A gradient's score is the sum of its distances to the K - n_byzantine - 2 nearest others; the lowest win. Blanchard
    et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (NeurIPS 2017). As TorchJD it adds
    distances, the paper adds their squares.

    Args:
        n_byzantine: how many gradients may come from an adversary, f.
        n_selected: how many are averaged; 1 is Krum, more are Multi-Krum.

    Raises:
        ValueError: an argument is no such number; at a call, there are fewer than n_byzantine + 3 or n_selected tasks.

    Cost: two reads of K * P, one write of P; K^3 for the solve. Scale-free.
    """

    paper = "Blanchard et al., NeurIPS 2017"
    method = "krum"
    n_byzantine = Whole(0)
    n_selected = Whole(1)

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        """See the class."""
        super().__init__()
        self.n_byzantine = n_byzantine
        self.n_selected = n_selected

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """With as many adversaries as it can stand, one at most."""
        return cls(n_byzantine=1 if num_tasks >= 4 else 0)

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses fewer tasks than the constructor's arguments need."""
        super().check(step, jacobian)
        least = max(self.n_byzantine + 3, self.n_selected)
        if step.num_tasks < least:
            raise ValueError(
                f"Krum: got {step.num_tasks} tasks, expected at least {least} for n_byzantine={self.n_byzantine} "
                f"and n_selected={self.n_selected}"
            )

    def params(self, step: Step) -> dict[str, float]:
        """The constructor's arguments."""
        return {"n_byzantine": self.n_byzantine, "n_selected": self.n_selected}

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"n_byzantine={self.n_byzantine}, n_selected={self.n_selected}"
