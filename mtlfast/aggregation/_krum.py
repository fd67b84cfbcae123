"""Krum and Multi-Krum."""

from __future__ import annotations

from typing_extensions import Self

from mtlfast._settings import Whole
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class Krum(SolvedAggregator):
    """The mean of the gradients that lie closest to their nearest neighbours, so that outliers get no weight.

    The score of a gradient is the sum of its distances to the K - n_byzantine - 2 nearest others. The gradients with
    the lowest scores are averaged, and of equal scores that of the lower index comes first. Blanchard et al., "Machine
    Learning with Adversaries: Byzantine Tolerant Gradient Descent" (NeurIPS 2017). Like TorchJD it adds distances,
    where the paper adds their squares.

    Args:
        n_byzantine: f, how many gradients may come from an adversary.
        n_selected: how many gradients are averaged. 1 is Krum, and more are Multi-Krum.

    Raises:
        ValueError: an argument is no such number. A call raises it if there are fewer tasks than n_byzantine + 3 or
            n_selected.

    Cost: two reads of K * P and one write of P; the solve takes K^3 operations. Scale-free.
    """

    paper = "Blanchard et al., NeurIPS 2017"
    method = "krum"
    n_byzantine = Whole(0)
    n_selected = Whole(1)

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__()
        self.n_byzantine = n_byzantine
        self.n_selected = n_selected

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """Krum for so many tasks: with one adversary if there are at least four tasks, else with none."""
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
        return {"n_byzantine": self.n_byzantine, "n_selected": self.n_selected}

    def extra_repr(self) -> str:
        return f"n_byzantine={self.n_byzantine}, n_selected={self.n_selected}"
