"""Adam for numbers that a loss weighting learns by itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Adam's state for K numbers: the running means of the gradient and of its square, and how often each moved."""

    mean: Tensor
    square: Tensor
    steps: Tensor


def adam(gradient: Tensor, before: Moments) -> tuple[Tensor, Moments]:
    """What to subtract from K numbers, for a learning rate of 1, and Adam's new state.

    The constants are the defaults of `torch.optim.Adam`. Each number has its own count of steps.
    """
    mean = 0.9 * before.mean + 0.1 * gradient
    square = 0.999 * before.square + 0.001 * gradient**2
    steps = before.steps + 1
    move = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
    return move, Moments(mean, square, steps)
