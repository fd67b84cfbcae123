"""A training step in plain PyTorch: each task's gradients by themselves, in float64, then their weighted sum.

The step's methods are twins of those under test, which see Gram matrices and losses alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mtlfast import TaskGradients
from mtlfast.aggregation import Aggregator, GramAggregator
from mtlfast.ops._precision import product_rtol
from mtlfast.weighting import LossWeighting

NUM_TASKS, BATCH = 4, 3


class Net(nn.Module):
    """Two shared layers, of which task 1 reaches the first alone, a layer that tasks 0 and 2 share, and heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second, self.common = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(NUM_TASKS))
        self.double()

    def loss(self, task: int, x: Tensor, factor: float) -> Tensor:
        """A loss of at least 0.1, whose gradient is multiplied by `factor`."""
        inner = self.first(x).tanh()
        if task != 1:
            inner = self.second(inner).tanh()
        if task in (0, 2):
            inner = self.common(inner)
        return 0.1 + factor * (self.heads[task](inner) - x.sum(1, keepdim=True) + task).square().mean()


@dataclass
class Sums:
    """What a step knows of its tasks: the sums of their gradients and losses over micro-batches.

    Attributes:
        rows: task -> parameter -> gradient, without those that the task does not reach.
        losses: task -> loss.
        counts: task -> number of micro-batches.
    """

    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, net: Net, x: Tensor, factors: Sequence[float | None]) -> None:
        """Adds a micro-batch. The tasks whose factor is None are absent from it."""
        named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        for task, factor in enumerate(factors):
            if factor is None:
                continue
            loss = net.loss(task, x, factor)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            row = self.rows.setdefault(task, {})
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    row[name] = row.get(name, 0) + gradient
            self.losses[task] = self.losses.get(task, 0) + loss.detach()
            self.counts[task] = self.counts.get(task, 0) + 1


@dataclass
class Model:
    """The twins of a step's methods, and the largest number of tasks that took part in a step so far."""

    aggregator: Aggregator
    weighting: LossWeighting | None
    known: int = 0

    def columns(self, net: Net, sums: Sums, shared: Sequence[str] | None) -> list[str] | None:
        """The names of the shared parameters that require grad; None if the step must be refused."""
        wanted = [name for name, p in net.named_parameters() if p.requires_grad]
        reached = {name: [task for task, row in sums.rows.items() if name in row] for name in wanted}
        if shared is None:
            columns = [name for name in wanted if len(reached[name]) > 1]
        else:
            columns = [name for name in wanted if name.split(".")[0] in shared]
        return columns if any(reached[name] for name in columns) else None

    def step(self, net: Net, sums: Sums, columns: list[str]) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """The gradients that the step adds to `.grad`, the losses and the weights."""
        tasks = sorted(sums.rows)
        losses = torch.stack([sums.losses[task] / sums.counts[task] for task in tasks])
        moves = None if self.weighting is None else self.weighting.step_weights(losses, tasks=tasks)
        loss_weights = torch.ones(len(tasks), dtype=torch.float64) if moves is None else moves.loss_weights.detach()
        there = [task for k, task in enumerate(tasks) if loss_weights[k] != 0 or not losses[k].isfinite()]
        nobody, there = not there, there or tasks
        trained = {name for name, p in net.named_parameters() if p.requires_grad}
        rows: dict[int, dict[str, Tensor]] = {}
        for k, task in enumerate(tasks):
            if task in there:
                factor = loss_weights[k] / sums.counts[task]
                rows[task] = {name: g * factor for name, g in sums.rows[task].items() if name in trained}
        added: dict[str, Tensor] = {}
        for row in rows.values():
            for name, gradient in row.items():
                if name not in columns:
                    added[name] = added.get(name, 0) + gradient
        reached = [name for name in columns if any(name in row for row in rows.values())]
        weights = None
        if isinstance(self.aggregator, GramAggregator):
            weights = torch.zeros(len(tasks), dtype=torch.float64)
            places = [task for task in there if any(name in rows[task] for name in columns)]
            if places:
                self.known = max(self.known, max(places) + 1)
                of_places = self._weights(net, rows, places, reached, losses[[tasks.index(k) for k in places]], nobody)
                weights[[tasks.index(task) for task in places]] = of_places
            for name in reached:
                parts = [weights[tasks.index(task)] * row[name] for task, row in rows.items() if name in row]
                added[name] = sum(parts)
        else:
            grads = [[row.get(name) for name in columns] for row in (rows.get(task, {}) for task in tasks)]
            direction = self.aggregator(TaskGradients.from_rows(grads))
            added |= {name: g for name, g in zip(columns, direction, strict=True) if g is not None}
        if moves is not None:
            moves.commit()
        return added, losses, weights

    def _weights(self, net, rows, places, reached, losses, nobody) -> Tensor:
        zeros = {name: torch.zeros_like(net.get_parameter(name)) for name in reached}
        J = torch.stack([torch.cat([rows[k].get(name, zeros[name]).flatten() for name in reached]) for k in places])
        rtol = len(places) * product_rtol(TaskGradients.from_matrix(J), None)
        mask = torch.zeros(len(places), dtype=torch.bool) if nobody else None
        return self.aggregator.weights(J @ J.T, losses=losses, tasks=places, rtol=rtol, mask=mask)


def state_of(module: nn.Module | None) -> dict[str, Tensor]:
    """Copies of the module's state."""
    return {} if module is None else {name: x.clone() for name, x in module.state_dict().items()}


def with_generator(make: Callable[..., Aggregator]) -> Callable[[], Aggregator]:
    return lambda: make(generator=torch.Generator().manual_seed(3))
