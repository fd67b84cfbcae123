"""A training run that can be saved in the middle of an epoch and resumed by new objects."""

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler

import mtlfast
from mtlfast.aggregation import Aggregator
from mtlfast.weighting import LossWeighting

SAMPLES, BATCH, MICRO_BATCHES = 40, 4, 3


class Net(nn.Module):
    """A trunk with an embedding, dropout and BatchNorm, of which task 1 does not reach the last layer, and heads."""

    def __init__(self, num_tasks: int, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(SAMPLES, 6, sparse=sparse)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.last = nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(num_tasks))

    @property
    def shared(self) -> list[nn.Module]:
        return [self.table, self.first, self.last]

    def loss(self, task: int, features: Tensor, ids: Tensor) -> Tensor:
        inner = features if task == 1 else self.last(features).tanh()
        return (self.heads[task](inner).squeeze(1) - (ids * (task + 1)).sin()).square().mean() + 0.1


class Training:
    """One run: the model, optimizer, scheduler, aggregator, weighting, accumulator, and the order of its data.

    Args:
        way: "stored", "closures" or "accumulated".
        aggregator: makes the aggregator.
        weighting: makes the weighting; None: the run has none.
        num_tasks: n.
        seed: of the new model and the data's order, which `load` replaces.
        sparse: whether the embedding has sparse gradients.
        accumulation: settings of the accumulator.
    """

    def __init__(
        self,
        way: str,
        aggregator: Callable[[], Aggregator],
        weighting: Callable[[], LossWeighting] | None = None,
        num_tasks: int = 3,
        seed: int = 0,
        sparse: bool = False,
        **accumulation: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.way, self.num_tasks = way, num_tasks
        self.net = Net(num_tasks, sparse)
        self.aggregator, self.weighting = aggregator(), None if weighting is None else weighting()
        parameters = [*self.net.parameters(), *([] if self.weighting is None else self.weighting.parameters())]
        self.optimizer = torch.optim.SGD(parameters, 0.05) if sparse else torch.optim.Adam(parameters, 0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, 0.8)
        self.accumulator = mtlfast.TaskGradientAccumulator(accumulation.pop("shared", self.net.shared), **accumulation)
        self.generator = torch.Generator().manual_seed(seed)
        self.taken = 0  # batches since the beginning
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.epoch_began = self.generator.get_state()
        self.batches = iter(BatchSampler(RandomSampler(range(SAMPLES), generator=self.generator), BATCH, False))

    def batch(self) -> Tensor:
        """The indices of the next batch's samples."""
        if self.taken and self.taken % (SAMPLES // BATCH) == 0:
            self._start_epoch()
        self.taken += 1
        return torch.tensor(next(self.batches))

    def losses(self) -> dict[str, Any]:
        """The losses of the next batch. The last task is absent from each fourth one."""
        ids, there = self.batch(), range(self.num_tasks - (self.num_tasks > 2 and self.taken % 4 == 0))
        if self.way == "closures":
            made = {k: lambda k=k: self.net.loss(k, self.net.first(self.net.table(ids)), ids) for k in there}
        else:
            features = self.net.first(self.net.table(ids))
            made = {k: self.net.loss(k, features, ids) for k in there}
        return {f"task {k}": made.get(k) for k in range(self.num_tasks)}

    def add(self, micro_batches: int) -> None:
        for _ in range(micro_batches):
            self.accumulator.add(self.losses())

    def step(self) -> list[Tensor]:
        """One step, and what it gives: the losses, the weights, all parameters and buffers."""
        self.optimizer.zero_grad()
        if self.way == "accumulated":
            self.add(MICRO_BATCHES - len(self.accumulator))
            result = mtlfast.backward(self.accumulator, self.aggregator, weighting=self.weighting)
        else:
            result = mtlfast.backward(self.losses(), self.aggregator, shared=self.net.shared, weighting=self.weighting)
        self.optimizer.step()
        self.scheduler.step()
        if self.weighting is not None:
            values: list[Tensor | None] = [None] * self.num_tasks
            for task, loss in zip(result.tasks, result.losses, strict=True):
                values[task] = 0.9 * loss.double()
            metrics = [None if value is None else 1 / (1 + value) for value in values]
            if type(self.weighting).__name__ != "DWA" or self.taken % 2 == 0:
                self.weighting.update(losses=values, metrics=metrics)
        weights = [] if result.weights is None else [result.weights]
        return [result.losses, *weights, *(x.clone() for x in self.net.state_dict().values())]

    @property
    def parts(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("net", "optimizer", "scheduler", "aggregator", "weighting")}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self) -> io.BytesIO:
        """A file with all states."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"accumulator": self.accumulator.state_dict(self.net), "taken": self.taken}
        file = io.BytesIO()
        torch.save(state | {"epoch": self.epoch_began, "global": torch.get_rng_state()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.accumulator.load_state_dict(state["accumulator"], self.net)
        self.generator.set_state(state["epoch"])
        self._start_epoch()
        self.taken = state["taken"]
        for _ in range((self.taken - 1) % (SAMPLES // BATCH) + 1):
            next(self.batches)
        torch.set_rng_state(state["global"])
