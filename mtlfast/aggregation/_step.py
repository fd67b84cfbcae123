"""What an aggregator is told about one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """One step as a method sees it, beside the task gradients.

    Attributes:
        num_tasks: K, how many tasks are present.
        losses: [K], the losses' values; None: not known.
        loss_scale: what the losses were multiplied by, a float or a tensor of one element; None: 1.
        tasks: the K present tasks' indices among all; None: there are no others.
        rtol: the relative precision of the gradients, for decisions about ranks; None: not known.
    """

    num_tasks: int
    losses: Tensor | None = None
    loss_scale: float | Tensor | None = None
    tasks: tuple[int, ...] | None = None
    rtol: float | None = None

    @property
    def precision(self) -> float:
        """`rtol`, or K * 1e-6 where it is not known."""
        return self.num_tasks * 1e-6 if self.rtol is None else self.rtol

    @property
    def present(self) -> Sequence[int]:
        """The present tasks' indices."""
        return range(self.num_tasks) if self.tasks is None else self.tasks
