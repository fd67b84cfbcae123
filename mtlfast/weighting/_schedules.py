"""Weights that follow a plan, or hold a share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._settings import Choice, Real, Whole
from mtlfast._vectors import vector
from mtlfast.weighting._base import Weighted
from mtlfast.weighting._losses import Feedback
from mtlfast.weighting._step import write


class _Scheduled(Weighted):
    """A method whose weights depend on the time alone."""

    keeps = "the time"
    unit = Choice("step", "update")
    time: Tensor

    def __init__(self, num_tasks: int, unit: Literal["step", "update"]) -> None:
        super().__init__(num_tasks)
        self.unit = unit
        self._keep_count("time")

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Those of now; then a step is over, if that is the unit."""
        weights = self._at(self.time.double(), tasks)
        if self.unit == "step":
            self._move(self.time, None, self.time + 1)
        return weights

    @abstractmethod
    def _at(self, time: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' weights at a time."""

    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """One unit is over, if that is an update."""
        if self.unit == "update":
            write(self.time, None, self.time + 1)

    def reset(self) -> None:
        """Back to the start."""
        self.time.zero_()


class CurriculumSchedule(_Scheduled):
    """Tasks enter one after another: weight 0 before a task's start, 1 after it, by a ramp between.

    At time t task k has weight (t - start_k + 1) / (ramp + 1), but at least 0 and at most 1.

    Args:
        starts: [n] when each task enters, in units, from 0.
        ramp: units from entering to the full weight; 0: at once.
        unit: "step": a call in training mode; "update": a call of `update()`, at an epoch's end for instance.

    Raises:
        ValueError: `starts` are no numbers, `ramp` is negative, `unit` is not one of these.

    State: the time.
    """

    ramp = Whole(0)
    starts: Tensor

    def __init__(
        self, starts: Sequence[float] | Tensor, ramp: int = 0, unit: Literal["step", "update"] = "step"
    ) -> None:
        numbers = vector(self, "starts", starts)
        super().__init__(len(numbers), unit)
        self.ramp = ramp
        self.register_buffer("starts", numbers)

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """A task enters at each call of `update()`, and has its full weight two calls later."""
        return cls(list(range(num_tasks)), ramp=2, unit="update")

    def _at(self, time: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return ((time - self._of(self.starts, tasks) + 1) / (self.ramp + 1)).clamp(0, 1)


class AnnealingSchedule(_Scheduled):
    """Weights that move from one value to another, each task's its own.

    Args:
        start: [n] the weights at first.
        end: [n] the weights after `steps` units, and from then on.
        steps: how many.
        shape: "linear", "cosine" (slow at both ends) or "exponential" (by the same factor each unit; weights must be
            positive).
        unit: "step": a call in training mode; "update": a call of `update()`, at an epoch's end for instance.

    Raises:
        ValueError: the vectors do not fit, or an argument is not one of these.

    State: the time.
    """

    steps = Whole(1)
    shape = Choice("linear", "cosine", "exponential")
    start: Tensor
    end: Tensor

    def __init__(
        self,
        start: Sequence[float] | Tensor,
        end: Sequence[float] | Tensor,
        steps: int,
        shape: Literal["linear", "cosine", "exponential"] = "linear",
        unit: Literal["step", "update"] = "step",
    ) -> None:
        first, last = vector(self, "start", start), vector(self, "end", end)
        super().__init__(len(first), unit)
        if len(last) != len(first):
            raise ValueError(f"AnnealingSchedule: end has {len(last)} entries, expected {len(first)} as start has")
        if shape == "exponential" and not bool((torch.cat([first, last]) > 0).all()):
            raise ValueError("AnnealingSchedule: a weight is not positive, expected positive ones for 'exponential'")
        self.steps = steps
        self.shape = shape
        self.register_buffer("start", first)
        self.register_buffer("end", last)

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """Weights from 2 to 1 in ten calls of `update()`."""
        return cls([2.0] * num_tasks, [1.0] * num_tasks, 10, unit="update")

    def _at(self, time: Tensor, tasks: tuple[int, ...]) -> Tensor:
        start, end = self._of(self.start, tasks), self._of(self.end, tasks)
        share = (time / self.steps).clamp(max=1)
        if self.shape == "exponential":
            return start ** (1 - share) * end**share
        if self.shape == "cosine":
            share = (1 - torch.cos(torch.pi * share)) / 2
        return start + share * (end - start)


class PriorityTask(Weighted):
    """Holds one task's weight; the others share the rest, so that all add up to 1.

    Where the task is absent, the others share all; where it is alone, it keeps its weight.

    Args:
        num_tasks: n.
        task: its index.
        weight: its weight, 0 to 1.

    Raises:
        ValueError: `weight` is outside of its range, or there is no such task.
    """

    task = Whole(0)
    weight = Real(0, 1)

    def __init__(self, num_tasks: int, task: int = 0, weight: float = 0.5) -> None:
        super().__init__(num_tasks)
        self.task = task
        self.weight = weight
        if self.task >= self._known_tasks():
            raise ValueError(f"PriorityTask: task is {task}, expected one of {num_tasks}")

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """They add up to 1, but for a task alone."""
        others = len(tasks) - (self.task in tasks)
        rest = 1 - self.weight if self.task in tasks else 1.0
        weights = torch.full_like(values, rest / max(others, 1))
        if self.task in tasks:
            weights[tasks.index(self.task)] = self.weight
        return weights
