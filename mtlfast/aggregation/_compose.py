"""`Compose`: one aggregator scales the task gradients, another aggregates them."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Self

from mtlfast.aggregation._gram_aggregator import GramAggregator
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._norm_balance import NormBalance
from mtlfast.aggregation._pcgrad import PCGrad
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step


class Compose(GramAggregator):
    """Scales the task gradients by one aggregator's weights, then aggregates the scaled gradients with another.

    The gradients are not read again for the second aggregator. If b are the first one's weights and D = diag(b), the
    Gram matrix of the scaled gradients is D G D, and the composed weights are b times the second one's weights on that.

    Args:
        balance: the aggregator whose weights scale the gradients, such as `NormBalance`.
        surgery: the aggregator of the scaled gradients.

    Raises:
        TypeError: one of them is not a `GramAggregator`.

    State: that of both. Cost: two reads of K * P and one write of P, and both solves. Scale-free if both are.
    """

    keeps = "its methods' state"

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
        """`NormBalance`, then `PCGrad`."""
        return cls(NormBalance(), PCGrad())

    @property
    def reads(self) -> Reads:  # type: ignore[override]
        """What the more demanding of the two reads."""
        return max(self.balance.reads, self.surgery.reads)

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if one of the two does."""
        self.balance.check(step, jacobian)
        self.surgery.check(step, jacobian)

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The product of both weights, [..., K] float64."""
        scales = self.balance.solve(gram, step)
        scaled = gram * (scales.unsqueeze(-1) * scales.unsqueeze(-2))
        return scales * self.surgery.solve(scaled, step)

    def reset(self) -> None:
        self.balance.reset()
        self.surgery.reset()

    def diagnostics(self) -> dict[str, int]:
        """The counts of both, added up."""
        counts = self.balance.diagnostics()
        for name, count in self.surgery.diagnostics().items():
            counts[name] = counts.get(name, 0) + count
        return counts
