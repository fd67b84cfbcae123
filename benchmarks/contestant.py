"""A contestant of a benchmark that goes on from the losses of one forward pass, and what it takes from there on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchjd.aggregation
from step_rounds import without_gradients
from step_ways import Model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchjd.autogram import Engine

from mtlfast.bench.peak_memory import extra_bytes

Backward = Callable[[Tensor, Any], Any]  # of the features and the losses of one forward pass


class Contestant(NamedTuple):
    """A way to go on from the losses, the model to which they belong, and its forward pass."""

    model: Model
    backward: Backward
    forward: Callable[[], tuple[Tensor, Any]]

    def step(self) -> Any:
        """A step without the optimizer's."""
        return self.backward(*self.forward())


def autogram(model: Model, weighting: str, batch_dim: int | None) -> Backward:
    """TorchJD's engine: G by a forward pass of its own, and one backward pass of the weighted losses; returns G.

    Args:
        model: it gets hooks.
        weighting: the name of TorchJD's class.
        batch_dim: the dimension of the samples, or None if losses are not those of single samples.
    """
    engine, weigh = Engine(model.trunk, batch_dim=batch_dim), getattr(torchjd.aggregation, weighting)()

    def run(features: Tensor, losses: Any) -> Tensor:
        stacked = losses if isinstance(losses, Tensor) else torch.stack(losses)
        gram: Tensor = engine.compute_gramian(stacked)
        stacked.backward(weigh(gram))
        return gram

    return run


def flops(contestant: Contestant) -> int:
    """The floating-point operations from the losses on. In a forward pass the counter would add hooks to the graph."""
    features, losses = contestant.forward()
    with FlopCounterMode(display=False) as counter:
        contestant.backward(features, losses)
    return int(counter.get_total_flops())


def second_peak(contestant: Contestant) -> int:
    """The bytes that a contestant's second step holds at most from the losses on, beside what is there then."""
    without_gradients(contestant.step, contestant.model.parameters)
    features, losses = contestant.forward()
    return extra_bytes(lambda: contestant.backward(features, losses))
