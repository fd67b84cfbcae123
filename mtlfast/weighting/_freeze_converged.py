"""Tasks that have converged are left aside."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real, Whole
from mtlfast.weighting._base import Weighted


class FreezeConverged(Weighted):
    """Takes a task's weight away when its loss has flattened, and gives it back when it rises.

    A task's running mean m = decay m + (1 - decay) L is an improvement where it is below the best one by more than
    tolerance |best|. After `patience` of its steps without one the task is frozen, at the level m: its weight, else 1,
    is `frozen_weight`. It returns as soon as m is above that level by more than tolerance |level|, and m is then its
    best.

    Args:
        num_tasks: n.
        patience: steps without improvement.
        tolerance: what counts as an improvement or a rise, relative.
        frozen_weight: of a frozen task; 0: it has no part in the step.
        decay: of the running mean, from 0 (the last loss alone) to 1.

    Raises:
        ValueError: an argument is outside of its range.

    State: 5 n numbers; `frozen` [n] tells which tasks are.
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
        """1, or `frozen_weight`, as this step's losses decide."""
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
