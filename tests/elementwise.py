"""The one table of element-wise aggregators: how each is made and what it promises. Tests run over its rows.

An element-wise aggregator looks at the task gradients themselves, so its direction is no w(G)^T J. Besides mtlfast's
own there are two in plain PyTorch, as a user would write one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlfast import TaskGradients
from mtlfast.aggregation import (
    DBMTL,
    Aggregator,
    Bloop,
    ExcessMTL,
    GradDrop,
    Median,
    MoCo,
    PseudoMomentum,
    Step,
    TrimmedMean,
)
from mtlfast.aggregation._keeps_state import KeepsState

EQUIVARIANT = "the same direction for the tasks in another order"
SCALE_FREE = "the direction is multiplied by what all gradients are multiplied by"
STATEFUL = "state for each parameter, which stays with it whatever a step reaches"


def stacked(grads: TaskGradients, t: int) -> Tensor:
    """The K gradients of tensor t, zeros where a task does not reach it."""
    example = grads.examples()[t]
    assert example is not None
    return torch.stack([torch.zeros_like(example) if g is None else g for g in grads.column(t)])


class Agreeing(Aggregator):
    """The sum of the K gradients where all have one sign, else zero; it returns its direction."""

    def aggregate(self, grads: TaskGradients, **context: object) -> list[Tensor | None]:
        columns = [None if shape is None else stacked(grads, t) for t, shape in enumerate(grads.shapes)]
        return [None if x is None else x.sum(0) * (x.sign().sum(0).abs() == len(x)) for x in columns]


class Momentum(Aggregator):
    """The sum of the K gradients, averaged over the steps by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[Tensor, Tensor] = {}

    def aggregate(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> None:
        assert grads.parameters is not None
        for t, (parameter, target) in enumerate(zip(grads.parameters, out, strict=True)):
            if target is None:
                continue
            total = stacked(grads, t).sum(0)
            mean = self.means.setdefault(parameter, torch.zeros_like(total))
            target.copy_(mean.mul_(0.5).add_(total, alpha=0.5))

    def reset(self) -> None:
        self.means.clear()


@dataclass(frozen=True)
class ElementWise:
    """A row of the table."""

    make: Callable[[], Aggregator]
    promises: frozenset[str] = frozenset()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


METHODS = {
    "GradDrop": ElementWise(lambda: GradDrop(generator=seeded()), frozenset({EQUIVARIANT, SCALE_FREE})),
    "GradDrop, f": ElementWise(
        lambda: GradDrop(f=torch.square, generator=seeded()), frozenset({EQUIVARIANT, SCALE_FREE})
    ),
    "GradDrop, average": ElementWise(lambda: GradDrop().eval(), frozenset({EQUIVARIANT, SCALE_FREE})),
    "TrimmedMean": ElementWise(lambda: TrimmedMean(0), frozenset({EQUIVARIANT, SCALE_FREE})),
    "Median": ElementWise(Median, frozenset({EQUIVARIANT, SCALE_FREE})),
    "Agreeing": ElementWise(Agreeing, frozenset({EQUIVARIANT, SCALE_FREE})),
    "Momentum": ElementWise(Momentum, frozenset({EQUIVARIANT, SCALE_FREE, STATEFUL})),
    "MoCo": ElementWise(MoCo, frozenset({EQUIVARIANT, STATEFUL})),
    "DBMTL": ElementWise(DBMTL, frozenset({EQUIVARIANT, SCALE_FREE, STATEFUL})),
    "ExcessMTL": ElementWise(ExcessMTL, frozenset({EQUIVARIANT, STATEFUL})),
    "PseudoMomentum": ElementWise(lambda: PseudoMomentum(4), frozenset({EQUIVARIANT, STATEFUL})),
    "Bloop": ElementWise(Bloop, frozenset({SCALE_FREE, STATEFUL})),
}


def state_of(aggregator: Aggregator, parameter: Tensor) -> list[Tensor]:
    """Copies of the tensors that a method keeps for a parameter."""
    if isinstance(aggregator, KeepsState):
        (column,) = [column for column in aggregator.kept._columns if column.parameter is parameter]
        return [value.clone() for value in column.tensors.values()]
    assert isinstance(aggregator, Momentum)
    return [aggregator.means[parameter].clone()]
