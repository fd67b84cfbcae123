"""Training and testing: the loop to copy is in `train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from data import Canvases, Digits, epoch, overlay
from model import Network
from tasks import Task
from torch import Tensor

import mtlfast
from mtlfast.aggregation import Aggregator
from mtlfast.weighting import FAMO, LossWeighting

BATCH = 100
LEARNING_RATE = 3e-3
TEST_ROUNDS = 4  # how often each test digit is shown on either side


@dataclass
class Run:
    """What one training of K tasks left behind.

    Attributes:
        canvases: for testing.
        losses: [K] test losses, before training and after each epoch.
        cosines: [K, K] for each epoch: between the trunk's task gradients, mean over the steps.
        conflicts: [K, K] for each epoch: the share of steps in which that cosine was negative.
        outputs: K test outputs after the last epoch, [B, outputs of the task] each.
        metrics: [K] test metrics after the last epoch.
    """

    canvases: Canvases
    losses: list[Tensor] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    conflicts: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)


def train(
    tasks: Sequence[Task],
    aggregator: Aggregator,
    digits: tuple[Digits, Digits],
    seed: int,
    epochs: int,
    tick: Callable[[], object],
    weighting: LossWeighting | None = None,
    groups: str | None = None,
) -> Run:
    """Trains a fresh network on K tasks and tests it after each epoch.

    Args:
        tasks: K of them; with one alone this is ordinary single-task training, whatever the aggregator.
        aggregator: how the trunk's K gradients become one.
        digits: for training and for testing.
        seed: of the initial weights and of the batches.
        epochs: each shows every training digit once on the left and once on the right.
        tick: called after each epoch.
        weighting: of the losses; after each epoch it is told how well the tasks do, exp(-training loss).
        groups: of the trunk's parameters, as in `mtlfast.backward`: "tensor", "module" or None.

    Returns:
        The history and the last test outputs.
    """
    train_digits, test_digits = digits
    torch.manual_seed(seed)
    network = Network(tasks).to(train_digits.images.device)
    learned = [] if weighting is None else list(weighting.parameters())
    optimizer = torch.optim.Adam([*network.parameters(), *learned], lr=LEARNING_RATE)
    pairs = torch.Generator().manual_seed(seed)
    run = Run(_test_canvases(test_digits, seed))
    _evaluate(network, tasks, run)
    for _ in range(epochs):
        cosines, seen = [], []
        for batch in epoch(train_digits, BATCH, pairs):
            outputs = network(batch.canvas)
            losses = [task.loss(output, batch) for task, output in zip(tasks, outputs, strict=True)]
            optimizer.zero_grad()
            result = mtlfast.backward(
                losses, aggregator, shared=network.trunk, weighting=weighting, groups=groups, diagnostics=True
            )
            optimizer.step()
            cosines.append(result.cosines)
            seen.append(result.losses)
            if isinstance(weighting, FAMO):
                weighting.update(losses=_losses(network, tasks, batch))
        if weighting is not None and not isinstance(weighting, FAMO):
            weighting.update(metrics=(-torch.stack(seen).mean(0)).exp())
        in_epoch = torch.stack(cosines).cpu().flatten(0, -3)  # with groups, of every group
        run.cosines.append(in_epoch.mean(0))
        run.conflicts.append((in_epoch < 0).double().mean(0))
        _evaluate(network, tasks, run)
        tick()
    return run


@torch.no_grad()
def _losses(network: Network, tasks: Sequence[Task], batch: Canvases) -> Tensor:
    """[K], of the network as it is now."""
    outputs = network(batch.canvas)
    return torch.stack([task.loss(output, batch) for task, output in zip(tasks, outputs, strict=True)])


@torch.no_grad()
def _evaluate(network: Network, tasks: Sequence[Task], run: Run) -> None:
    """Tests on `run.canvases`: one more entry in `run.losses`; outputs and metrics are replaced."""
    outputs = network(run.canvases.canvas)
    results = list(zip(tasks, outputs, strict=True))
    run.losses.append(torch.stack([task.loss(output, run.canvases) for task, output in results]).cpu())
    run.metrics = [task.metric(output, run.canvases).item() for task, output in results]
    run.outputs = outputs


def _test_canvases(digits: Digits, seed: int) -> Canvases:
    """The same for every method of one seed."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(digits.classes), generator=generator) for _ in range(2 * TEST_ROUNDS)]
    left, right = (torch.cat(half).to(digits.images.device) for half in (orders[::2], orders[1::2]))
    return overlay(digits, left, right)
