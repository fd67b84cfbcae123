"""Training, testing and timing: the loop to copy is in `train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from data import Judge, Pairs, losses, mixing
from model import Config, Scorer
from torch import Tensor

import mtlfast
from mtlfast.aggregation import Aggregator, UPGrad
from mtlfast.bench.timing import Timing, take_turns

BATCH, TRAINING, TEST = 32, 20_000, 2000  # pairs
LEARNING_RATE, WARMUP = 1e-3, 50
EVERY = 20  # steps between tests


@dataclass
class Run:
    """What one training left behind.

    Attributes:
        steps: after how many it was tested.
        accuracies: [K] for each of these, in %: how often the answer that a reward prefers has the higher score.
        plan: how the last step computed the gradients of the three losses.
    """

    steps: list[int] = field(default_factory=list)
    accuracies: list[Tensor] = field(default_factory=list)
    plan: str = ""


def pairs_of(seed: int) -> tuple[Pairs, Pairs]:
    """Pairs for training and for testing. Each seed has its own rewards."""
    generator = torch.Generator().manual_seed(seed)
    judge = Judge(generator)
    return judge.pairs(TRAINING, generator), judge.pairs(TEST, generator)


def train(
    aggregator: Aggregator,
    pairs: tuple[Pairs, Pairs],
    config: Config,
    seed: int,
    steps: int,
    tick: Callable[[], object],
) -> Run:
    """Trains a new model and tests it now and then.

    Args:
        aggregator: how the gradients of the three rewards' losses become one.
        pairs: for training and for testing.
        config: of the model.
        seed: of the initial weights and of the batches.
        steps: how many.
        tick: called after each step.

    Returns:
        The history.
    """
    torch.manual_seed(seed)
    model = Scorer(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0) * (1 - step / steps)
    )
    run = Run()
    for step in range(1, steps + 1):
        batch = pairs[0].at(torch.randint(TRAINING, (BATCH,)))
        optimizer.zero_grad()
        margins = model(batch.tokens)
        result = mtlfast.backward(margins, aggregator, shared=model, mixing=mixing(margins, batch.preferred))
        optimizer.step()
        schedule.step()
        if step % EVERY == 0 or step == steps:
            run.steps.append(step)
            run.accuracies.append(accuracies(model, pairs[1]))
        run.plan = result.plan.way
        tick()
    return run


@torch.no_grad()
def accuracies(model: Scorer, pairs: Pairs) -> Tensor:
    """[K] the share of pairs, in %, that the model orders as each reward does. Ties of a reward do not count."""
    right = (model(pairs.tokens) * pairs.preferred > 0).sum(1)
    return 100 * right / pairs.preferred.abs().sum(1)


def step_times(config: Config, rounds: int) -> dict[str, Timing]:
    """The seconds of a step without the optimizer's, in turn: of a plain one, by mixing, and with K backward passes."""
    model = Scorer(config)
    batch = pairs_of(0)[0].at(torch.arange(BATCH))
    aggregator = UPGrad()

    def plain() -> None:
        model.zero_grad()
        losses(model(batch.tokens), batch.preferred).sum().backward()

    def by(way: str) -> None:
        model.zero_grad()
        margins = model(batch.tokens)
        A = mixing(margins, batch.preferred)
        mtlfast.backward(margins, aggregator, shared=model, mixing=A, jacobian=way)

    turns = {"plain": plain, "mixing": partial(by, "mixing"), "K passes": partial(by, "stored")}
    return take_turns(turns, rounds, warmups=3, rotate=True)
