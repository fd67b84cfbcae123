"""What the ways have in common in which several ranks make one Jacobian of their own ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from mtlfast._shards import Shards


class Kind(NamedTuple):
    """Columns whose products are summed in one way.

    Attributes:
        columns: their places among all columns.
        total: the sum over those ranks that hold different elements of them.
    """

    columns: Sequence[int]
    total: Callable[[str, Tensor], Tensor]


class Reduction(Protocol):
    """Makes the mean over the ranks of each task's gradients, of which each rank holds a part or all.

    Every rank calls `start` once for each task, in the order of the tasks, and then `rows` once.
    """

    def start(self, label: str, gradients: Sequence[Tensor | None]) -> None:
        """Takes one task's gradients of the parameters, and begins to reduce them.

        Args:
            label: what errors call the task.
            gradients: one for each parameter; None counts as zeros, because another rank may have one.
        """

    def rows(self) -> list[list[Tensor | None]]:
        """Waits for the reductions, and returns this rank's part of each task's mean gradient, [K][T]."""

    def stand_ins(self) -> list[Tensor]:
        """For each parameter a tensor of the shape of this rank's part, the same object at every step."""

    def kinds(self) -> list[Kind]:
        """The columns by how their products are summed."""

    def shards(self, reached: Sequence[bool]) -> Shards | None:
        """What methods that work element by element need; None if the rank holds all elements.

        Args:
            reached: for each parameter, whether a task of any rank reaches it.
        """

    def whole(self, direction: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What may be added to the parameters' `.grad`, in memory of its own, from this rank's part of a direction."""
