"""`TaskSampler`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from mtlfast._numbers import plain
from mtlfast._settings import Choice, Real, Whole


class TaskSampler(Sampler[list[int]]):
    """Draws batches from several tasks' data: `DataLoader(ConcatDataset(datasets), batch_sampler=TaskSampler(...))`.

    Sample i of task k has the index i + n_0 + ... + n_(k-1), as in ConcatDataset. The samples of a task come in random
    order, and each comes once before one comes again, also across epochs. So a small task that is drawn often repeats
    its samples.

    Args:
        sizes: [K], the numbers of samples n_k of the tasks.
        batch_size: the number of samples in a batch.
        strategy: how often a task is drawn. "proportional": in proportion to n_k; "uniform": all tasks equally often;
            "temperature": in proportion to n_k^beta; "round_robin": one after another.
        beta: the exponent of "temperature". 1 is proportional, 0 is uniform, and the usual temperature is 1 / beta.
        mixed: draw a task for each sample of a batch. By default all samples of a batch are of one task.
        num_batches: the number of batches in an epoch. None: enough to hold as many samples as there are.
        seed: the seed of the draws, which differ from epoch to epoch.

    Raises:
        ValueError: an argument is outside of its range.

    `state_dict()` holds the epoch and the batch. After `load_state_dict` the next iteration continues from there with
    the same batches. A DataLoader with workers fetches batches in advance, so set "batch" in the saved state to the
    number of batches that the training has seen.
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
        self._counted = (
            0,
            torch.zeros(len(self.sizes), dtype=torch.int64),
        )

    def probabilities(self) -> list[float]:
        """The probability of each task in a draw."""
        beta = {"proportional": 1.0, "temperature": self.beta}.get(self.strategy, 0.0)
        powers = [size**beta for size in self.sizes]
        return [power / sum(powers) for power in powers]

    def tasks_of(self, indices: Sequence[int]) -> list[int]:
        """The task of each sample of a batch."""
        ends = torch.tensor(self.sizes).cumsum(0)
        places = torch.searchsorted(ends, torch.tensor(indices, dtype=torch.int64), right=True)
        return places.tolist()  # host: CPU tensors, as in all of this file

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """The remaining batches of this epoch. After them the next epoch begins."""
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
        """The number of samples of each task that the earlier epochs have drawn."""
        counted, used = self._counted if self._counted[0] <= self.epoch else (0, torch.zeros_like(self._counted[1]))
        for epoch in range(counted, self.epoch):
            used = used + torch.bincount(self._tasks(epoch).reshape(-1), minlength=len(self.sizes))
        self._counted = (self.epoch, used)
        return used.tolist()  # host: a CPU tensor

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the number of its batches that have been yielded."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the epoch and the batch of a saved state."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])


class _Order:
    """The samples of a task in random order, one permutation after another."""

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
    """A seed made of several numbers, the same in every process."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = ((mixed ^ (number & (2**64 - 1))) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % 2**63
