"""Balancing, then surgery."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Self

from mtlfast.aggregation._base import GramAggregator
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._norm_balance import NormBalance
from mtlfast.aggregation._pcgrad import PCGrad
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step


class Compose(GramAggregator):
    """Multiplies each task's gradient by one aggregator's weights, then aggregates them by another, in one pass.

    With the balance's weights b, the Gram matrix of the scaled gradients is D G D for D = diag(b), so neither the
    gradients nor their products are read again: the weights are b times those of the surgery on D G D.

    Args:
        balance: whose weights scale the gradients, a norm balancing for instance.
        surgery: how the scaled gradients become one.

    Raises:
        TypeError: one of them has no weights.

    State: theirs. Cost: theirs on one Gram matrix, two reads of K * P, one write of P. Scale-free where both are.
    """

    keeps = "theirs"

    def __init__(self, balance: GramAggregator, surgery: GramAggregator) -> None:
        super().__init__()
        for name, stage in (("balance", balance), ("surgery", surgery)):
            if not isinstance(stage, GramAggregator):
                raise TypeError(
                    f"Compose: {name} is a {type(stage).__name__}, expected one with weights (a GramAggregator)"
                )
        self.balance = balance
        self.surgery = surgery

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """All gradients at one length, then PCGrad."""
        return cls(NormBalance(), PCGrad())

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """The more of the two."""
        return max(self.balance.reads, self.surgery.reads)

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses what one of the two refuses."""
        self.balance.check(step, jacobian)
        self.surgery.check(step, jacobian)

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The product of their weights, [..., K] float64."""
        scales = self.balance.solve(gram, step)
        scaled = gram * (scales.unsqueeze(-1) * scales.unsqueeze(-2))
        return scales * self.surgery.solve(scaled, step)

    def reset(self) -> None:
        self.balance.reset()
        self.surgery.reset()

    def diagnostics(self) -> dict[str, int]:
        """Both, added up."""
        counts = self.balance.diagnostics()
        for name, count in self.surgery.diagnostics().items():
            counts[name] = counts.get(name, 0) + count
        return counts
