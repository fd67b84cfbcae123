"""Loss weightings that follow a plan: schedules over time, and a fixed share for one task."""

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
    """A method whose weights depend on the time alone, which counts steps or calls of `update`."""

    keeps = "the time"
    unit = Choice("step", "update")
    time: Tensor

    def __init__(self, num_tasks: int, unit: Literal["step", "update"]) -> None:
        super().__init__(num_tasks)
        self.unit = unit
        self._keep_count("time")

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present weights. In a training step the time then advances, if its unit is the step."""
        weights = self._at(self.time.double(), tasks)
        if self.unit == "step":
            self._move(self.time, None, self.time + 1)
        return weights

    @abstractmethod
    def _at(self, time: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' weights at this time."""

    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Advances the time, if its unit is the update."""
        if self.unit == "update":
            write(self.time, None, self.time + 1)

    def reset(self) -> None:
        """Sets the time to 0."""
        self.time.zero_()


class CurriculumSchedule(_Scheduled):
    """Lets tasks enter one after another: a task's weight rises from 0 to 1 after its start.

    At time t task k has the weight (t - start_k + 1) / (ramp + 1), but at least 0 and at most 1.

    Args:
        starts: [n], the time at which each task enters, from 0.
        ramp: how much later the task has its full weight. 0: at once.
        unit: what the time counts: "step", calls in training mode, or "update", calls of `update()`, for instance one
            at the end of each epoch.

    Raises:
        ValueError: `starts` is not a vector of numbers, `ramp` is negative, or `unit` is not one of these.

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
        """One task enters at each call of `update()` and has its full weight two calls later."""
        return cls(list(range(num_tasks)), ramp=2, unit="update")

    def _at(self, time: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return ((time - self._of(self.starts, tasks) + 1) / (self.ramp + 1)).clamp(0, 1)


class AnnealingSchedule(_Scheduled):
    """Moves each task's weight from one value to another.

    Args:
        start: [n], the weights at time 0.
        end: [n], the weights from time `steps` on.
        steps: how long the weights move.
        shape: "linear", "cosine", which is slow at both ends, or "exponential", which multiplies a weight by the same
            factor each time. The weights must be positive for "exponential".
        unit: what the time counts: "step", calls in training mode, or "update", calls of `update()`, for instance one
            at the end of each epoch.

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
        """Weights that go from 2 to 1 in ten calls of `update()`."""
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
    """Fixes one task's weight. The other tasks share the rest equally, so that all weights add up to 1.

    If that task is absent, the other tasks' weights add up to 1. If it is the only one, it keeps its weight.

    Args:
        num_tasks: n, the number of tasks.
        task: the index of the task whose weight is fixed.
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
        others = len(tasks) - (self.task in tasks)
        rest = 1 - self.weight if self.task in tasks else 1.0
        weights = torch.full_like(values, rest / max(others, 1))
        if self.task in tasks:
            weights[tasks.index(self.task)] = self.weight
        return weights
