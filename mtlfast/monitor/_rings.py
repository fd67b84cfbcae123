"""The numbers of the last steps, in ring buffers on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# A squared length is never negative, so that the diagonal of a Gram matrix can say who was there. An index of the
# present tasks would be a copy from the host, which waits.
ABSENT = -1.0


class Rings(NamedTuple):
    """Numbers of W steps of n tasks in G groups, 1 group without groups, as float64. Step i is in row i % W.

    Attributes:
        gram: [W, G, n, n], with `ABSENT` in the rows and columns of absent tasks, and in the rows of no step yet.
        weights: [W, G, n], NaN where they are not known. Those of absent tasks mean nothing.
        losses: [W, n]. Those of absent tasks mean nothing.
        scales: [W], what the losses were multiplied by.
    """

    gram: Tensor
    weights: Tensor
    losses: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, window: int, groups: int, tasks: int, device: torch.device) -> Rings:
        """Rings of no step yet."""

        def filled(value: float, *shape: int) -> Tensor:
            return torch.full((window, *shape), value, dtype=torch.float64, device=device)

        return cls(
            filled(ABSENT, groups, tasks, tasks),
            filled(torch.nan, groups, tasks),
            filled(torch.nan, tasks),
            filled(1.0),
        )

    @property
    def window(self) -> int:
        """W."""
        return len(self.scales)

    @property
    def num_tasks(self) -> int:
        """n."""
        return self.losses.shape[1]

    @property
    def num_groups(self) -> int:
        """G."""
        return self.gram.shape[1]

    def each(self, change: Callable[[Tensor], Tensor]) -> Rings:
        """The rings, each changed in the same way."""
        return Rings(*map(change, self))

    def with_tasks(self, number: int) -> Rings:
        """Rings for more tasks, which have been absent so far."""
        more = number - self.num_tasks
        return Rings(
            F.pad(self.gram, (0, more, 0, more), value=ABSENT),
            F.pad(self.weights, (0, more), value=torch.nan),
            F.pad(self.losses, (0, more), value=torch.nan),
            self.scales,
        )

    def write(
        self,
        row: int,
        tasks: Sequence[int],
        gram: Tensor,
        weights: Tensor | None,
        losses: Tensor,
        loss_scale: float | Tensor,
    ) -> None:
        """Replaces a row by the numbers of a step of K tasks, in four copies if no task is absent.

        Args:
            row: which.
            tasks: the K tasks' indices.
            gram: [G, K, K].
            weights: [G, K] or None.
            losses: [K].
            loss_scale: what the losses were multiplied by.
        """
        if len(tasks) < self.num_tasks:
            self.gram[row].fill_(ABSENT)
        if weights is None:
            self.weights[row].fill_(torch.nan)
        for at, of in runs(tasks):
            self.losses[row, of].copy_(losses[at])
            if weights is not None:
                self.weights[row, :, of].copy_(weights[:, at])
            for at_column, of_column in runs(tasks):
                self.gram[row, :, of, of_column].copy_(gram[:, at, at_column])
        self.scales[row].fill_(loss_scale)

    def in_order(self, steps: int) -> Rings:
        """Only the rows of the last of so many steps, the oldest first."""
        at = steps % self.window
        if steps <= self.window:
            return self.each(lambda x: x[:steps])
        return self.each(lambda x: torch.cat([x[at:], x[:at]]))


def runs(tasks: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The places and the indices of consecutive tasks: of (0, 1, 3) those of 0 and 1, then those of 3."""
    start = 0
    for place in range(1, len(tasks) + 1):
        if place == len(tasks) or tasks[place] != tasks[place - 1] + 1:
            yield slice(start, place), slice(tasks[start], tasks[place - 1] + 1)
            start = place
