"""Which tasks a batch holds samples of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from mtlfast._numbers import plain
from mtlfast._settings import Choice, Real, Whole


class TaskSampler(Sampler[list[int]]):
    """Batches from several tasks' data, for `DataLoader(ConcatDataset(datasets), batch_sampler=TaskSampler(...))`.

    Sample i of task k has the index i + n_0 + ... + n_(k-1), as ConcatDataset counts. A task's samples come in a random
    order, all of them before one comes again, across epochs too: so small tasks repeat where they are drawn more often.

    Args:
        sizes: [K] the tasks' numbers of samples, n_k.
        batch_size: samples in a batch.
        strategy: how often a task is drawn. "proportional": as n_k; "uniform": all the same; "temperature": as
            n_k^beta; "round_robin": in turn.
        beta: of "temperature": 1 is proportional, 0 uniform; the usual temperature T is 1 / beta.
        mixed: each sample of a batch is of a task drawn anew; else a batch is of one task.
        num_batches: in an epoch; None: as many as hold all samples.
        seed: of the draws. Every epoch's differ.

    Raises:
        ValueError: an argument is outside of its range.

    `state_dict()` holds the epoch and the batch; after `load_state_dict` the next iteration goes on there, with the
    batches that would have come. A DataLoader with workers asks for batches ahead of those that it has handed out: then
    set "batch" to how many the training has seen.
    """

    strategy = Choice("proportional", "uniform", "temperature", "round_robin")
    batch_size = Whole(1)
    beta = Real(0)
    num_batches = Whole(1)

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        strategy: Literal["proportional", "uniform", "temperature", "round_robin"] = "proportional",
        *,
        beta: float = 0.5,
        mixed: bool = False,
        num_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sizes = [plain(size) for size in sizes]
        if not self.sizes or not all(Whole(1).holds(size) for size in self.sizes):
            raise ValueError(f"TaskSampler: sizes is {self.sizes}, expected integers of at least 1")
        self.batch_size = batch_size
        self.strategy = strategy
        self.beta = beta
        self.mixed = mixed
        self.num_batches = -(-sum(self.sizes) // self.batch_size) if num_batches is None else num_batches
        self.seed = plain(seed)
        self.epoch = 0
        self.batch = 0
        self._counted = (0, torch.zeros(len(self.sizes), dtype=torch.int64))  # epochs, and what they have drawn

    def probabilities(self) -> list[float]:
        """How often each task is drawn."""
        beta = {"proportional": 1.0, "temperature": self.beta}.get(self.strategy, 0.0)
        powers = [size**beta for size in self.sizes]
        return [power / sum(powers) for power in powers]

    def tasks_of(self, indices: Sequence[int]) -> list[int]:
        """The tasks that a batch's samples are of."""
        ends = torch.tensor(self.sizes).cumsum(0)
        places = torch.searchsorted(ends, torch.tensor(indices, dtype=torch.int64), right=True)
        return places.tolist()  # host: CPU tensors, as in all of this file

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of this epoch's batches; then the next epoch is the current one."""
        tasks = self._tasks(self.epoch)
        used = self._used()
        orders = [_Order(size, self.seed, task) for task, size in enumerate(self.sizes)]
        first = [sum(self.sizes[:task]) for task in range(len(self.sizes))]
        for number in range(self.num_batches):
            batch = []
            for task in tasks[number].tolist():  # host: a CPU tensor
                batch.append(first[task] + orders[task].at(used[task]))
                used[task] += 1
            if number >= self.batch:
                self.batch = number + 1
                yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def _tasks(self, epoch: int) -> torch.Tensor:
        """The task of each sample of an epoch, [batches, batch_size]."""
        draws = self.batch_size if self.mixed else 1
        if self.strategy == "round_robin":
            place = torch.arange(self.num_batches * draws) + epoch * self.num_batches * draws
            drawn = place % len(self.sizes)
        else:
            generator = torch.Generator().manual_seed(hash_of(self.seed, epoch))
            weights = torch.tensor(self.probabilities(), dtype=torch.float64)
            drawn = torch.multinomial(weights, self.num_batches * draws, replacement=True, generator=generator)
        return drawn.reshape(self.num_batches, draws).expand(self.num_batches, self.batch_size)

    def _used(self) -> list[int]:
        """How many samples of each task the earlier epochs have drawn."""
        counted, used = self._counted if self._counted[0] <= self.epoch else (0, torch.zeros_like(self._counted[1]))
        for epoch in range(counted, self.epoch):
            used = used + torch.bincount(self._tasks(epoch).reshape(-1), minlength=len(self.sizes))
        self._counted = (self.epoch, used)
        return used.tolist()  # host: a CPU tensor

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches have been handed out."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])


class _Order:
    """A task's samples in random order, one permutation after another."""

    def __init__(self, size: int, seed: int, task: int) -> None:
        self.size, self.seed, self.task = size, seed, task
        self.round, self.permutation = -1, torch.empty(0)

    def at(self, place: int) -> int:
        turn, rest = divmod(place, self.size)
        if turn != self.round:
            generator = torch.Generator().manual_seed(hash_of(self.seed, self.task, turn))
            self.round, self.permutation = turn, torch.randperm(self.size, generator=generator)
        return int(self.permutation[rest])  # host: a CPU tensor


def hash_of(*numbers: int) -> int:
    """A seed from several numbers, the same in every process."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
