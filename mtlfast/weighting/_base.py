"""The base classes of all loss weightings."""

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
    """A method that makes one weighted loss of the task losses.

    Call `weighting(losses).backward()`, or pass it to `mtlfast.backward(..., weighting=...)`, which aggregates the
    gradients of the weighted losses.

    A call in training mode is a training step, and so is `mtlfast.backward` in either mode. A step changes the state of
    the tasks that are present, unless their losses are not finite. A call after `.eval()` changes no state and draws no
    random number; a method that draws takes the expected weights. `update` counts in either mode. No call waits for a
    GPU.

    Args:
        num_tasks: n, the number of tasks, for a method that keeps state for each task. None: any number of tasks.

    Attributes:
        paper: where the method was published, or "".
        keeps: what the method remembers from step to step for n tasks, or "". It is kept in float64 buffers on the
            weighting's device.
        reads_norms: whether a step needs the norms of the task gradients. `mtlfast.backward` then runs the tasks'
            backward passes before it asks for the weights.
        norm_order: the order of these norms, 2 or 1.
        layers: the shared parameters of whose gradients the norms are taken. None: all shared parameters.
        draws: whether a step draws random numbers.
    """

    paper: ClassVar[str] = ""
    keeps: ClassVar[str] = ""
    reads_norms: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    norm_order: int = 2
    layers: tuple[Tensor, ...] | None = None
    num_tasks = Or(Whole(1), None)
    _held: list[Move] | None = None  # what a step will write to the state once it has succeeded
    _norms: Tensor | None = None  # [K] float64, the norms of the step's task gradients, while its weights are computed
    _largest_weight = torch.finfo(torch.float32).max  # the largest number that the losses' dtype can hold

    def __init__(self, num_tasks: int | None = None) -> None:
        super().__init__()
        self.num_tasks = num_tasks

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """A weighting for so many tasks with settings to start from; `mtlfast.weightings` calls it.

        A method whose constructor cannot be called with the number of tasks alone overrides it.
        """
        return cls(num_tasks)

    def forward(self, losses: Losses, *, tasks: Sequence[int] | None = None) -> Tensor:
        """The weighted loss, a scalar that can be differentiated.

        Args:
            losses: the K scalar losses, in a list, a dict whose values count in order, a generator, or a tensor [K]. An
                entry of None stands for an absent task.
            tasks: the tasks' indices, if `losses` holds only those of the present tasks.

        Raises:
            ValueError: the losses do not fit. On the CPU also: the method does not take one of them, a negative one for
                instance. On a GPU the result is NaN then, and `diagnostics()` counts it.
        """
        values, present = self._gather(losses, tasks)
        self._largest_weight = torch.finfo(values.dtype).max
        return self._weigh(widened(values), present)

    def _weigh(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Calls `combine`; a method that does not take every loss checks the losses here first."""
        return self.combine(values, tasks)

    @abstractmethod
    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The weighted loss of the present tasks' losses [K]. In training mode it changes the state."""

    def step_weights(
        self,
        losses: Tensor,
        *,
        tasks: Sequence[int] | None = None,
        loss_scale: float | Tensor | None = None,
        norms: Tensor | None = None,
    ) -> StepWeights:
        """The weights of one training step, for a caller that runs the tasks' backward passes itself.

        The call is a training step even in eval mode.

        Args:
            losses: [K] the present tasks' losses. Their graphs are not used.
            tasks: the present tasks' indices; None: 0 to K - 1.
            loss_scale: the factor by which the losses were multiplied. The weighting sees the losses without it, and
                the gradients of the weighting's own parameters are multiplied by it. Both are as in
                `loss_scale * weighting(losses / loss_scale)`.
            norms: [K] the norms of the present tasks' gradients of `layers`, of order `norm_order`, before any weight
                and without `loss_scale`. A weighting that does not read them ignores them.

        Returns:
            StepWeights: its `commit()` changes the state.

        Raises:
            ValueError: a call of the weighting would raise; the weighting reads norms, and `norms` is None or has
                another number of entries than `losses`; or, on the CPU, all losses are finite and a weight is not.
        """
        scale = 1.0 if loss_scale is None else loss_scale
        if self.reads_norms:
            norms = self._fitting_norms(norms, losses)
        moves: list[Move] = []
        with torch.inference_mode(False), torch.enable_grad(), self._as_step(moves, norms):
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

    def _fitting_norms(self, norms: Tensor | None, losses: Tensor) -> Tensor:
        """The norms in float64 on the losses' device, detached."""
        if norms is None:
            raise ValueError(
                f"{type(self).__name__}: norms is None, expected the norms of the task gradients, which "
                "mtlfast.backward computes"
            )
        if norms.shape != losses.shape:
            shapes = f"{list(norms.shape)}, expected {list(losses.shape)} as losses"
            raise ValueError(f"{type(self).__name__}: norms has shape {shapes}")
        return norms.detach().to(losses.device, torch.float64)

    @contextmanager
    def _as_step(self, moves: list[Move], norms: Tensor | None) -> Iterator[None]:
        """Within it a call is a training step, and what the step would write to the state is collected in `moves`."""
        modes = {module: module.training for module in self.modules()}
        weightings = [module for module in modes if isinstance(module, LossWeighting)]
        self.train()
        for weighting in weightings:
            weighting._held, weighting._norms = moves, norms
        try:
            yield
        finally:
            for weighting in weightings:
                weighting._held = weighting._norms = None
            for module, mode in modes.items():
                module.training = mode

    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Feedback after a step or an epoch. Methods that do not learn from it ignore it.

        Args:
            losses: the losses after the step or of the epoch: a tensor [n], or a list or dict of numbers, scalar
                tensors and None.
            norms: [K] the norms of the gradients of the tasks that `losses` has, or of all tasks.
            metrics: the tasks' performance, in the same forms. The method says which metric it expects.
        """

    def reset(self) -> None:
        """Forgets all state, as if new."""

    def diagnostics(self) -> dict[str, int]:
        """Counts of what went wrong since `reset()`. On a GPU it waits for the device."""
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
        """The present tasks' numbers [K] that `update` was given, float64 and detached, and the tasks' indices."""
        values, places, number = present_numbers(type(self).__name__, name, given)
        return values, self._fitting_places(name, places, number)

    def _fitting_places(self, name: str, places: tuple[int, ...], number: int) -> tuple[int, ...]:
        if self.num_tasks is not None and number != self.num_tasks:
            raise ValueError(f"{type(self).__name__}: got {number} {name}, expected {self.num_tasks} as num_tasks says")
        return places

    def _known_tasks(self) -> int:
        """The number of tasks, for a method that must know it."""
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
        """Writes the present tasks' entries of a buffer, or all of it without `tasks`, where `when` holds.

        Only a training step writes, and one for `step_weights` only at its `commit()`.
        """
        if not self.training:
            return
        if when is not None:
            new = torch.where(when, new, state if tasks is None else self._of(state, tasks))
        if self._held is None:
            write(state, tasks, new)
        else:
            self._held.append((state, tasks, new))

    def _learn(self, state: Tensor, tasks: tuple[int, ...], new: Tensor, when: Tensor) -> None:
        """Writes the tasks' entries of a buffer where `when` holds, in either mode: for feedback."""
        write(state, tasks, torch.where(when, new, self._of(state, tasks)))


class Weighted(LossWeighting):
    """A method that sums the losses with weights. The weights are not differentiated."""

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The sum of the losses times their weights."""
        with torch.no_grad():
            weights = self.weights(values.detach().double(), tasks)
        return (weights.to(values.dtype) * values).sum()

    @abstractmethod
    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The weights [K] of the present tasks for their losses' values [K] float64.

        In training mode it changes the state.
        """


class NeedsPositiveLosses(LossWeighting):
    """A method whose losses must be positive, or at least 0 if it accepts a loss of 0."""

    nonpositive: Tensor

    def __init__(self, num_tasks: int | None = None) -> None:
        super().__init__(num_tasks)
        self._keep_count("nonpositive")

    def _weigh(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Checks the losses, then calls `combine`."""
        return self.combine(values * self._one_if_positive(values, tasks), tasks)

    def _takes_zero(self) -> bool:
        """Whether the method takes a loss of 0."""
        return False

    def _bounds(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor | None:
        """The lower bounds [K] that the losses must be above; None: 0."""
        return None

    def _one_if_positive(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor | float:
        """1 if the method takes the losses. Otherwise it raises, or on a GPU returns NaN and counts the step."""
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
        """1 if the losses' dtype can hold the weights and the terms. Otherwise as `_one_if_positive`."""
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
        """NaN if `wrong` holds, else 1, without waiting for a GPU.

        A NaN reaches the gradients, so that a GradScaler skips the step.
        """
        if self.training:
            self.nonpositive += wrong
        return torch.where(wrong, torch.nan, 1.0)

    def reset(self) -> None:
        """Forgets all state, as if new."""
        self.nonpositive.zero_()

    def diagnostics(self) -> dict[str, int]:
        """The number of steps with a loss that is not positive, or so near to 0 that its weight is not finite."""
        return {"nonpositive": int(self.nonpositive)}


def readable(values: Tensor) -> bool:
    """Whether the host can read the numbers without waiting: they are on the CPU and not traced."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def widened(values: Tensor) -> Tensor:
    """The values in float32 if their dtype has 16 bits, else as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def shares(weights: Tensor, total: float) -> Tensor:
    """The weights, scaled so that they add up to `total`."""
    return total * weights / weights.sum()
