"""The weights of a training step, whose state changes only once the step has succeeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast._by_task import put

# A write to the state that is not made yet: the buffer, the tasks whose entries it replaces (None: all), the new
# values.
Move = tuple[Tensor, Sequence[int] | None, Tensor]


class StepWeights(NamedTuple):
    """The weights of the losses in one step, and the changes of the weighting that follow if the step succeeds.

    Attributes:
        loss_weights: [K] the derivative of the weighted loss with respect to each task's loss.
        learned: the weighting's own parameters, each with its gradient.
        moves: what `commit` writes to the weighting's state.
    """

    loss_weights: Tensor
    learned: list[tuple[Tensor, Tensor]]
    moves: list[Move]

    def commit(self) -> None:
        """Writes the weighting's new state. If the step fails before, the state stays as it was."""
        for move in self.moves:
            write(*move)


@torch.no_grad()
def write(state: Tensor, tasks: Sequence[int] | None, new: Tensor) -> None:
    """Writes the tasks' entries of one buffer, or all of it if `tasks` is None."""
    if tasks is None:
        state.copy_(new)
    else:
        put(state, tasks, new)
