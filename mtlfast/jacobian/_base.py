"""What every way to have the Jacobian of the task losses can be asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtlfast.task_gradients import TaskGradients


class Jacobian(ABC):
    """The Jacobian J [K, P] of K task losses by the shared parameters, as an operator: nobody needs its elements.

    A way to have J is a subclass in a file of its own. Making one looks at the autograd graph and computes nothing, so
    that an aggregator can refuse what it cannot work with. `obtain` makes the backward passes. Then an aggregator asks
    for `gram`, `norms` or `rows`, and one `write` or `put` ends the step.

    Attributes:
        plan: the name of this way, which `StepResult.plan` repeats.
        parameters: the shared parameters that want a gradient. They are the columns of J, in this order at every step,
            whether the step reaches them or not.
    """

    plan: ClassVar[str]
    parameters: tuple[Tensor, ...]

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """K."""

    @abstractmethod
    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Makes the backward passes, of each loss times its weight; it is called once, before anything is asked.

        Args:
            loss_weights: [K]; None: 1 each.
        """

    @property
    def no_rows(self) -> str | None:
        """Why it cannot give `rows()`, as the end of a sentence; None: it can."""
        return f"a {type(self).__name__} does not hold them"

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of the shared parameters."""

    @abstractmethod
    def product_rtol(self, precision: str | None = None) -> float:
        """The relative precision of a product of two gradients; a decision about ranks takes K times that."""

    @property
    @abstractmethod
    def taking_part(self) -> list[int] | None:
        """The rows of the tasks that have a part in the shared update; None: all.

        A task that reaches none of the shared parameters has none, nor has one whose loss weight is 0, as far as the
        host can see that.
        """

    @property
    def mask(self) -> Tensor | None:
        """[K] bool, which tasks have a loss weight other than 0, where only the device can see that; None: all."""
        return None

    @abstractmethod
    def gram(self, precision: str | None = None) -> Tensor:
        """G = J J^T, [K, K] float64, its sums "exact" or "fast" as `mtlfast.ops.gram` has them."""

    @abstractmethod
    def norms(self) -> Tensor:
        """The length of each row, [K] float64."""

    def rows(self) -> TaskGradients:
        """The task gradients, for element-wise methods.

        Raises:
            TypeError: this way does not hold them.
        """
        raise TypeError(f"rows: expected task gradients that are held, but {self.no_rows}")

    @abstractmethod
    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        """Adds w J to `.grad` of the shared parameters, and every other reached leaf's plain gradient to its own.

        An error leaves every `.grad` as it was.

        Args:
            weights: [K].
            loss_weights: [K], what each task's part of a plain gradient is multiplied by; None: 1 each.

        Raises:
            ValueError: `weights` is not [K].
        """

    def put(self, direction: Sequence[Tensor | None], loss_weights: Tensor | None = None) -> None:
        """As `write`, for a direction that an element-wise method made of `rows()`.

        Args:
            direction: one tensor for each shared parameter, None where no task reaches it. Nobody else holds their
                memory: they may become `.grad`.
            loss_weights: as in `write`.

        Raises:
            TypeError: this way has no `rows()`.
        """
        raise TypeError(f"put: expected a direction made of task gradients, but {self.no_rows}")

    def check_weights(self, weights: Tensor) -> None:
        """One sentence if these are not one weight for each task."""
        if weights.shape != (self.num_tasks,):
            raise ValueError(
                f"write: weights has shape {list(weights.shape)}, expected [{self.num_tasks}], one weight for each task"
            )
