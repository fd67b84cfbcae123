"""A contestant of a benchmark that goes on from the losses of one forward pass, and what it takes from there on."""

from collections.abc import Callable
from typing import Any, NamedTuple

from step_rounds import without_gradients
from step_ways import Model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
