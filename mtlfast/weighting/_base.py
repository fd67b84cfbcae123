"""The protocol that every loss weighting keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtlfast._by_task import put, take
from mtlfast._exact_state import ExactState

Losses = Sequence[Tensor | None] | Tensor


class LossWeighting(ExactState, ABC):
    """Losses in, one weighted loss out: `weighting(losses).backward()`, or `mtlfast.backward(..., weighting=...)`.

    The K losses are a list, where None is an absent task, or a tensor [K]. State is held for each task, in float64
    buffers on the weighting's device, and moves at calls in training mode alone: not for absent tasks, not by losses
    that are not finite, not after `.eval()`. Nothing waits for a GPU.

    Args:
        num_tasks: n, for how many tasks there is state; None: any number, there is none.

    Attributes:
        paper: who published it where, or "".
        keeps: what it remembers from step to step for n tasks, or "".
    """

    paper: ClassVar[str] = ""
    keeps: ClassVar[str] = ""

    def __init__(self, num_tasks: int | None = None) -> None:
        """See the class."""
        super().__init__()
        if num_tasks is not None and (isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1):
            raise ValueError(f"{type(self).__name__}: num_tasks is {num_tasks!r}, expected an integer of at least 1")
        self.num_tasks = num_tasks

    def forward(self, losses: Losses, *, tasks: Sequence[int] | None = None) -> Tensor:
        """The weighted loss, a scalar that can be differentiated.

        Args:
            losses: the K tasks' scalar losses, None for an absent one; or a tensor [K].
            tasks: where `losses` holds the present tasks only, their indices.

        Raises:
            ValueError: the losses do not fit; on the CPU, one is not positive where the method needs that (elsewhere
            the result is NaN, and `diagnostics()` counts it).
        """
        values, present = self._gather(losses, tasks)
        return self.combine(values, present)

    @abstractmethod
    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The weighted loss of the present tasks' losses [K]; state moves."""

    def update(
        self, *, losses: Losses | None = None, norms: Tensor | None = None, metrics: Losses | None = None
    ) -> None:
        """Feedback after a step or an epoch, for methods that learn from it; the others do nothing.

        Args:
            losses: losses after the step, or of an epoch.
            norms: [K] the task gradients' norms.
            metrics: the tasks' performance, as the method says.
        """

    def reset(self) -> None:
        """Forgets all state, as if new."""

    def diagnostics(self) -> dict[str, int]:
        """Counts of what went wrong since `reset()`; on a GPU this waits for it."""
        return {}

    def _gather(self, losses: Losses, tasks: Sequence[int] | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """The present tasks' losses [K], in float32 at least, and their indices."""
        name = type(self).__name__
        if isinstance(losses, Tensor):
            if losses.dim() != 1:
                raise ValueError(f"{name}: losses is a tensor of shape {list(losses.shape)}, expected [K] or a list")
            values, present = losses, tuple(range(len(losses)))
        else:
            some = {k: loss for k, loss in enumerate(losses) if loss is not None}
            for k, loss in some.items():
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    got = f"has shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
                    raise ValueError(f"{name}: loss {k} {got}, expected a scalar Tensor or None")
            if not some:
                raise ValueError(f"{name}: got {len(losses)} losses, none of them present, expected at least one")
            values, present = torch.stack([loss.reshape(()) for loss in some.values()]), tuple(some)
        number = len(losses)
        if tasks is not None:
            present, number = tuple(tasks), len(tasks)
        if len(present) != len(values):
            raise ValueError(f"{name}: got {len(values)} losses and {len(present)} tasks, expected as many")
        if self.num_tasks is not None and tasks is None and number != self.num_tasks:
            raise ValueError(f"{name}: got {number} losses, expected {self.num_tasks} as num_tasks says")
        if self.num_tasks is not None and max(present) >= self.num_tasks:
            raise ValueError(f"{name}: got task {max(present)}, expected {self.num_tasks} tasks as num_tasks says")
        return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values, present

    def _keep_buffer(self, name: str, *shape: int, fill: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        """A buffer that starts as `fill`."""
        self.register_buffer(name, torch.full(shape, fill, dtype=dtype))

    def _of(self, state: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' entries of a tensor [n]."""
        return take(state, tasks)

    def _move(self, state: Tensor, tasks: tuple[int, ...], new: Tensor, when: Tensor | None = None) -> None:
        """Writes the present tasks' entries, in training mode, where `when` holds."""
        if not self.training:
            return
        if when is not None:
            new = torch.where(when, new, self._of(state, tasks))
        put(state, tasks, new)


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


class OfPositive(LossWeighting):
    """A method of losses that must be positive."""

    nonpositive: Tensor

    def __init__(self, num_tasks: int | None = None) -> None:
        """See the class."""
        super().__init__(num_tasks)
        self._keep_buffer("nonpositive", dtype=torch.int64)

    def forward(self, losses: Losses, *, tasks: Sequence[int] | None = None) -> Tensor:
        """As every weighting's; first it looks for losses that are not positive."""
        values, present = self._gather(losses, tasks)
        return self.combine(self._positive(values, values, present), present)

    def _positive(self, values: Tensor, positive: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """`values`, or NaN in their place where an entry of `positive` is not positive."""
        wrong = positive.detach() <= 0
        if wrong.device.type == "cpu" and not torch.compiler.is_compiling():
            if bool(wrong.any()):  # host: a CPU tensor
                k = int(wrong.nonzero()[0])
                raise ValueError(
                    f"{type(self).__name__}: the loss of task {tasks[k]} is {float(values[k]):g}, expected a number "
                    f"above {float(values[k] - positive[k]):g}"
                )
            return values
        # To look would wait for a GPU. NaN reaches the gradients, and a GradScaler skips the step.
        some = wrong.any()
        self.nonpositive += some
        return values * torch.where(some, torch.nan, 1.0).to(values.dtype)

    def reset(self) -> None:
        """Forgets all state, as if new."""
        self.nonpositive.zero_()

    def diagnostics(self) -> dict[str, int]:
        """How many steps had a loss that is not positive."""
        return {"nonpositive": int(self.nonpositive)}


def shares(weights: Tensor, total: float) -> Tensor:
    """The weights times what makes them add up to `total`."""
    return total * weights / weights.sum()
