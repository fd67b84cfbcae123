"""`FreezeConverged`."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real, Whole
from mtlfast.weighting._base import Weighted


class FreezeConverged(Weighted):
    """Freezes a task when its loss no longer falls, and unfreezes it when the loss rises.

    A task has the weight 1, or `frozen_weight` while it is frozen. The method follows the running mean of its loss, m =
    decay m + (1 - decay) L. The mean improves if it is below the best one so far by more than tolerance |best|. After
    `patience` steps of the task without improvement the task is frozen, and its mean then is its level. It is unfrozen
    when the mean exceeds the level by more than tolerance |level|, and the best is then reset to the mean.

    Args:
        num_tasks: n, the number of tasks.
        patience: after how many steps without improvement a task is frozen.
        tolerance: the relative change that counts as an improvement or a rise.
        frozen_weight: the weight of a frozen task. With 0 it takes no part in the step.
        decay: the decay of the running mean. With 0 it is the last loss.

    Raises:
        ValueError: an argument is outside of its range.

    State: 5 n numbers. The buffer `frozen` [n] tells which tasks are frozen.
    """

    keeps = "5 n means and counts"
    patience = Whole(1)
    tolerance = Real(0)
    frozen_weight = Real(0)
    decay = Real(0, 1, most_itself=False)
    mean: Tensor
    best: Tensor
    since: Tensor
    frozen: Tensor
    level: Tensor

    def __init__(
        self,
        num_tasks: int,
        patience: int = 100,
        tolerance: float = 0.01,
        frozen_weight: float = 0.0,
        decay: float = 0.9,
    ) -> None:
        super().__init__(num_tasks)
        self.patience = patience
        self.tolerance = tolerance
        self.frozen_weight = frozen_weight
        self.decay = decay
        for name in ("mean", "best", "level"):
            self._keep_state(name, fill=torch.nan)
        for name in ("since", "frozen"):
            self._keep_state(name)

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """1, or `frozen_weight` for a task that is frozen after this step's losses."""
        mean, best, since, frozen, level = (
            self._of(state, tasks) for state in (self.mean, self.best, self.since, self.frozen, self.level)
        )
        is_frozen, finite = frozen > 0, values.isfinite()
        mean = torch.where(mean.isnan(), values, self.decay * mean + (1 - self.decay) * values)
        rises = is_frozen & (mean > level + self.tolerance * level.abs())
        improves = best.isnan() | (mean < best - self.tolerance * best.abs()) | rises
        since = torch.where(improves, 0.0, since + 1)
        best = torch.where(improves, mean, best)
        freezes = ~is_frozen & (since >= self.patience)
        level = torch.where(freezes, mean, level)
        is_frozen = (is_frozen & ~rises) | freezes
        for state, new in (
            (self.mean, mean),
            (self.best, best),
            (self.since, since),
            (self.frozen, is_frozen.double()),
            (self.level, level),
        ):
            self._move(state, tasks, new, when=finite)
        return torch.where(is_frozen, self.frozen_weight, 1.0).double()

    def reset(self) -> None:
        """Forgets the losses; no task is frozen."""
        for buffer in (self.mean, self.best, self.level):
            buffer.fill_(torch.nan)
        for buffer in (self.since, self.frozen):
            buffer.zero_()
