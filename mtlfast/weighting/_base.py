"""The protocol that every loss weighting keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._by_task import take
from mtlfast._exact_state import ExactState
from mtlfast._settings import Or, Whole
from mtlfast.weighting._losses import Feedback, Losses, present_losses, present_numbers, task_indices
from mtlfast.weighting._step import Move, StepWeights, write


class LossWeighting(ExactState, ABC):
    """Losses in, one weighted loss out: `weighting(losses).backward()`, or `mtlfast.backward(..., weighting=...)`.

    The K losses are a list, where None is an absent task, a dict, whose values count in order, or a tensor [K]. State
    is held for each task, in float64 buffers on the weighting's device.

    A call in training mode is a step, and so is `mtlfast.backward` in either mode: state moves, but not for absent
    tasks, and not by losses that are not finite. A call after `.eval()` moves no state and draws no random number; a
    method that draws takes the expected weights. Feedback by `update` counts in either mode. Nothing waits for a GPU.

    Args:
        num_tasks: n, for how many tasks there is state; None: any number, there is none.

    Attributes:
        paper: who published it where, or "".
        keeps: what it remembers from step to step for n tasks, or "".
    """

    paper: ClassVar[str] = ""
    keeps: ClassVar[str] = ""
    num_tasks = Or(Whole(1), None)
    _held: list[Move] | None = None  # moves of a step that is not over
    _largest_weight = torch.finfo(torch.float32).max  # that the losses' dtype can hold

    def __init__(self, num_tasks: int | None = None) -> None:
        super().__init__()
        self.num_tasks = num_tasks

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """One for so many tasks with settings to start from, as `mtlfast.weightings` makes it.

        A method whose constructor cannot be called with the number of tasks alone overrides it.
        """
        return cls(num_tasks)

    def forward(self, losses: Losses, *, tasks: Sequence[int] | None = None) -> Tensor:
        """The weighted loss, a scalar that can be differentiated.

        Args:
            losses: the K tasks' scalar losses, None for an absent one, in a list, a dict or a generator; or a tensor
                [K].
            tasks: where `losses` holds the present tasks only, their indices.

        Raises:
            ValueError: the losses do not fit; on the CPU, one is outside of what the method takes (elsewhere the result
            is NaN, and `diagnostics()` counts it).
        """
        values, present = self._gather(losses, tasks)
        self._largest_weight = torch.finfo(values.dtype).max
        return self._weigh(widened(values), present)

    def _weigh(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """`combine`, once the losses are known to be such as the method takes."""
        return self.combine(values, tasks)

    @abstractmethod
    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The weighted loss of the present tasks' losses [K]; state moves."""

    def step_weights(
        self, losses: Tensor, *, tasks: Sequence[int] | None = None, loss_scale: float | Tensor | None = None
    ) -> StepWeights:
        """One training step, whatever the mode, for a caller that runs the tasks' backward passes itself.

        Args:
            losses: [K] the present tasks' losses; they are not differentiated through.
            tasks: their indices; None: all.
            loss_scale: what the losses were multiplied by. The weighting sees them without it, and the gradients of
                what it learns are multiplied by it, as those of `loss_scale * weighting(losses / loss_scale)` are.

        Returns:
            StepWeights: state moves at its `commit()`.

        Raises:
            ValueError: as a call; or, on the CPU, the losses are finite and a weight is not.
        """
        scale = 1.0 if loss_scale is None else loss_scale
        moves: list[Move] = []
        with torch.inference_mode(False), torch.enable_grad(), self._as_step(moves):
            values = (losses.detach() / scale).requires_grad_()
            total = self(values, tasks=tasks)
            parameters: list[Tensor] = [p for p in self.parameters() if p.requires_grad]
            weights, *gradients = torch.autograd.grad(total, [values, *parameters], allow_unused=True)
        weights = torch.zeros_like(losses) if weights is None else weights
        if readable(weights) and bool(values.isfinite().all()) and not bool(weights.isfinite().all()):
            k = int(weights.isfinite().logical_not().nonzero()[0])  # host: CPU tensors, here and below
            loss, weight = float(values.detach()[k]), float(weights[k])
            raise ValueError(
                f"{type(self).__name__}: loss {k} is {loss:g} and its weight {weight:g}, expected a finite one"
            )
        learned = [(p, scale * g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        return StepWeights(weights, learned, moves)

    @contextmanager
    def _as_step(self, moves: list[Move]) -> Iterator[None]:
        """A call within it is a training step, and its moves are held back in `moves`."""
        modes = {module: module.training for module in self.modules()}
        weightings = [module for module in modes if isinstance(module, LossWeighting)]
        self.train()
        for weighting in weightings:
            weighting._held = moves
        try:
            yield
        finally:
            for weighting in weightings:
                weighting._held = None
            for module, mode in modes.items():
                module.training = mode

    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Feedback after a step or an epoch, for methods that learn from it; the others do nothing.

        Args:
            losses: losses after the step, or of an epoch: a tensor [n], or a list or dict of numbers, scalar tensors
                and None.
            norms: [K] the task gradients' norms.
            metrics: the tasks' performance, as the method says; in the same forms.
        """

    def reset(self) -> None:
        """Forgets all state, as if new."""

    def diagnostics(self) -> dict[str, int]:
        """Counts of what went wrong since `reset()`; on a GPU this waits for it."""
        return {}

    def _gather(self, losses: Losses, tasks: Sequence[int] | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """The present tasks' losses [K] and their indices."""
        values, places, number = present_losses(type(self).__name__, losses)
        if tasks is None:
            return values, self._fitting_places("losses", places, number)
        name = type(self).__name__
        present = task_indices(name, tasks)
        if len(present) != len(values):
            raise ValueError(f"{name}: got {len(values)} losses and {len(present)} tasks, expected equal numbers")
        if self.num_tasks is not None and max(present) >= self.num_tasks:
            raise ValueError(f"{name}: got task {max(present)}, expected {self.num_tasks} tasks as num_tasks says")
        return values, present

    def _feedback(self, name: str, given: Feedback) -> tuple[Tensor, tuple[int, ...]]:
        """The same for `update`: float64, detached."""
        values, places, number = present_numbers(type(self).__name__, name, given)
        return values, self._fitting_places(name, places, number)

    def _fitting_places(self, name: str, places: tuple[int, ...], number: int) -> tuple[int, ...]:
        if self.num_tasks is not None and number != self.num_tasks:
            raise ValueError(f"{type(self).__name__}: got {number} {name}, expected {self.num_tasks} as num_tasks says")
        return places

    def _known_tasks(self) -> int:
        """How many tasks there are, for a method that must know."""
        if self.num_tasks is None:
            raise ValueError(f"{type(self).__name__}: num_tasks is None, expected an integer of at least 1")
        return int(self.num_tasks)

    def _keep_state(self, name: str, fill: float = 0.0) -> None:
        """A float64 buffer with an entry for each task, which starts as `fill`."""
        self.register_buffer(name, torch.full((self._known_tasks(),), fill, dtype=torch.float64))

    def _keep_count(self, name: str, persistent: bool = True) -> None:
        """An integer buffer, which starts at 0."""
        self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=persistent)

    def _of(self, state: Tensor, tasks: Sequence[int]) -> Tensor:
        """The present tasks' entries of a tensor [n]."""
        return take(state, tasks)

    def _move(self, state: Tensor, tasks: Sequence[int] | None, new: Tensor, when: Tensor | None = None) -> None:
        """A step writes the present tasks' entries where `when` holds; without `tasks`, the whole buffer."""
        if not self.training:
            return
        if when is not None:
            new = torch.where(when, new, state if tasks is None else self._of(state, tasks))
        if self._held is None:
            write(state, tasks, new)
        else:
            self._held.append((state, tasks, new))

    def _learn(self, state: Tensor, tasks: tuple[int, ...], new: Tensor, when: Tensor) -> None:
        """Feedback writes the same, in either mode."""
        write(state, tasks, torch.where(when, new, self._of(state, tasks)))


class Weighted(LossWeighting):
    """A method that is a weighted sum of the losses, by weights that are not differentiated."""

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The sum of the losses times their weights."""
        with torch.no_grad():
            weights = self.weights(values.detach().double(), tasks)
        return (weights.to(values.dtype) * values).sum()

    @abstractmethod
    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' weights [K] for their losses' values [K] float64; state moves."""


class NeedsPositiveLosses(LossWeighting):
    """A method whose losses must be positive, or at least 0 if it accepts a loss of 0."""

    nonpositive: Tensor

    def __init__(self, num_tasks: int | None = None) -> None:
        super().__init__(num_tasks)
        self._keep_count("nonpositive")

    def _weigh(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """First it looks for losses that the method does not take."""
        return self.combine(values * self._one_if_positive(values, tasks), tasks)

    def _takes_zero(self) -> bool:
        """Is a loss of 0 one that the method takes?"""
        return False

    def _bounds(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor | None:
        """What the losses must be above, [K]; None: 0."""
        return None

    def _one_if_positive(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor | float:
        """1 for losses that the method takes; a refusal, or where the host cannot look, NaN and a count for others."""
        values = values.detach()
        bounds = self._bounds(values, tasks)
        heights = values if bounds is None else values - bounds
        wrong = heights < 0 if self._takes_zero() else heights <= 0
        if readable(wrong):
            if not bool(wrong.any()):  # host: a CPU tensor
                return 1.0
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"{type(self).__name__}: the loss of task {tasks[k]} is {float(values[k]):g}, expected a number above "
                f"{0 if bounds is None else float(bounds[k]):g}{' or equal to it' if self._takes_zero() else ''}"
            )
        return self._nan_and_count(wrong.any())

    def _one_if_finite(
        self, weights: Tensor, values: Tensor, tasks: tuple[int, ...], terms: Tensor | None = None
    ) -> Tensor | float:
        """1, or the same, for weights that the losses' dtype can hold, and the terms of the weighted loss as well."""
        values = values.detach()
        wrong = ~(weights.abs() <= self._largest_weight)
        if terms is not None:
            wrong = wrong | ~(terms.abs() <= max(self._largest_weight, torch.finfo(torch.float32).max))
        if readable(wrong):
            if not bool(wrong.any()) or not bool(values.isfinite().all()):  # host: CPU tensors
                return 1.0
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"{type(self).__name__}: the loss of task {tasks[k]} is {float(values[k]):g} and its weight "
                f"{float(weights[k]):g}, expected losses whose weights and weighted sum their dtype can hold"
            )
        return self._nan_and_count(wrong.any() & values.isfinite().all())

    def _nan_and_count(self, wrong: Tensor) -> Tensor:
        """NaN if `wrong` holds, else 1: to look would wait for a GPU.

        NaN reaches the gradients, and a GradScaler skips the step.
        """
        if self.training:
            self.nonpositive += wrong
        return torch.where(wrong, torch.nan, 1.0)

    def reset(self) -> None:
        """Forgets all state, as if new."""
        self.nonpositive.zero_()

    def diagnostics(self) -> dict[str, int]:
        """How many steps had a loss that is not positive, or so near to 0 that its weight is not finite."""
        return {"nonpositive": int(self.nonpositive)}


def readable(values: Tensor) -> bool:
    """May the host look at the numbers without waiting: a CPU tensor, and not while compiling?"""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def widened(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def shares(weights: Tensor, total: float) -> Tensor:
    """The weights times what makes them add up to `total`."""
    return total * weights / weights.sum()
