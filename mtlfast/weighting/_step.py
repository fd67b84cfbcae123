"""What a weighting gives a training step that is not over yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast._by_task import put

# A buffer, the tasks whose entries are new (None: all of it), and those.
Move = tuple[Tensor, Sequence[int] | None, Tensor]


class StepWeights(NamedTuple):
    """The losses' weights in one step, and what becomes of the weighting once the step has succeeded.

    Attributes:
        loss_weights: [K] the derivative of the weighted loss by each task's.
        learned: the weighting's own parameters, each with its gradient.
        moves: the state that `commit` writes.
    """

    loss_weights: Tensor
    learned: list[tuple[Tensor, Tensor]]
    moves: list[Move]

    def commit(self) -> None:
        """Moves the weighting's state; a step that fails before leaves it as it was."""
        for move in self.moves:
            write(*move)


@torch.no_grad()
def write(state: Tensor, tasks: Sequence[int] | None, new: Tensor) -> None:
    """Moves one buffer."""
    if tasks is None:
        state.copy_(new)
    else:
        put(state, tasks, new)
