"""`Jacobian`, the base class of all ways to compute the Jacobian of the task losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtlfast._arguments import Columns
from mtlfast._losses import Present
from mtlfast.aggregation import Groups, Products, do_nothing
from mtlfast.jacobian._plan import Plan
from mtlfast.task_gradients import TaskGradients


class Jacobian(ABC):
    """The Jacobian J [K, P] of K task losses with respect to the shared parameters, for use without its elements.

    A subclass is one way to compute J. The constructor looks at the autograd graph and computes nothing, so that an
    aggregator can still refuse the step. `obtain` runs the backward passes. Then an aggregator asks for `gram`, `norms`
    or `rows`, and one call of `write` or `put` ends the step.

    Attributes:
        way: the name of this way.
        cross_gram: computes the products J_1 J_2^T of two batches' gradients, [K, K] float64, with `precision` as in
            `gram`; None if there is one batch.
        groups: the groups of columns, which the caller sets before `obtain`. What is asked of the Jacobian then has a
            leading dimension [G]. None: no groups.
        parameters: the shared parameters that require grad. They are the columns of J, in the same order at every step,
            even if the losses do not reach them all.
        present: the K present tasks.
        losses: [K] the losses' values, detached; None if only `obtain` computes them.
    """

    way: ClassVar[str]
    cross_gram: Products | None = None
    groups: Groups | None = None
    parameters: tuple[Tensor, ...]
    present: Present
    losses: Tensor | None = None

    @property
    def plan(self) -> Plan:
        """How the task gradients are computed, which is also `StepResult.plan`."""
        return Plan(self.way)

    @property
    def num_tasks(self) -> int:
        """K, the number of present tasks."""
        return len(self.present.tasks)

    @abstractmethod
    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Runs the backward pass of each loss times its weight. It is called once, before anything is asked.

        Args:
            loss_weights: [K]. None: 1 each, or not known before `losses` are.
        """

    def weigh(self, loss_weights: Tensor) -> None:
        """Multiplies what `obtain` computed by loss weights that follow from losses which only `obtain` computes.

        Args:
            loss_weights: [K].
        """
        raise TypeError(f"weigh: a {type(self).__name__} takes loss weights in obtain")

    @property
    def columns(self) -> Columns:
        """The shared parameters that require grad and their names; empty if these are not known yet."""
        return Columns([], [])

    @property
    def no_rows(self) -> str | None:
        """Why `rows()` is not available, as the end of a sentence; None if it is."""
        return f"a {type(self).__name__} does not hold them"

    @property
    def no_state(self) -> str | None:
        """Why methods cannot keep state for each parameter, as the end of a sentence; None if they can."""
        return None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the shared parameters."""

    @abstractmethod
    def product_rtol(self, precision: str | None = None) -> float:
        """The relative precision of a dot product of two gradients. Decisions about ranks take K times that."""

    @property
    @abstractmethod
    def taking_part(self) -> list[int] | None:
        """The tasks that take part in the shared update, as rows of J; None: all.

        A task does not take part if it reaches none of the shared parameters, or if its loss weight is 0 and the host
        can read that.
        """

    @property
    def mask(self) -> Tensor | None:
        """[K] or [G, K] bool, which tasks take part in which group, where `taking_part` cannot say it; None: all."""
        return None

    @abstractmethod
    def gram(self, precision: str | None = None) -> Tensor:
        """The Gram matrix G = J J^T, [K, K] or [G, K, K] float64, with `precision` as in `mtlfast.ops.gram`."""

    @abstractmethod
    def norms(self) -> Tensor:
        """The norm of each row, [K] or [G, K] float64."""

    def norms_at(self, layers: Sequence[Tensor] | None = None, order: int = 2) -> Tensor:
        """The norm of each row over some columns, whatever the groups, [K] float64.

        Args:
            layers: the shared parameters whose columns count. None: all.
            order: 2, or 1 for the sum of the absolute values.

        Raises:
            TypeError: this way does not know them.
        """
        raise TypeError(f"norms_at: expected norms over some columns, but a {type(self).__name__} does not know them")

    def rows(self) -> TaskGradients:
        """The task gradients, for element-wise methods.

        Raises:
            TypeError: this way does not keep them.
        """
        raise TypeError(f"rows: expected task gradients in memory, but {self.no_rows}")

    @property
    def written(self) -> list[Tensor]:
        """After `write` or `put`: the leaves whose `.grad` it wrote without calling their post-accumulate hooks.

        The caller calls these at the end of the step, when nothing of it can fail any more.
        """
        return []

    @abstractmethod
    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        """Adds w J to `.grad` of the shared parameters, and the plain gradients of all other leaves to theirs.

        An error leaves every `.grad` as it was.

        Args:
            weights: [K] or [G, K].
            loss_weights: [K], the factor of each task's part of the plain gradients. None: 1 each.

        Raises:
            ValueError: `weights` has another shape.
        """

    def put(
        self,
        direction: Sequence[Tensor | None],
        loss_weights: Tensor | None = None,
        finish: Callable[[], None] = do_nothing,
    ) -> None:
        """Does what `write` does, for a direction that an element-wise method made of `rows()`.

        Args:
            direction: one tensor for each shared parameter, or None if no task reaches it. Nothing else may hold their
                memory, because they may become `.grad`.
            loss_weights: as in `write`.
            finish: what `Aggregator.prepare` returned. It is called when nothing can fail any more, and writes the
                values of `direction`.

        Raises:
            TypeError: this way does not keep the task gradients.
        """
        raise TypeError(f"put: expected a direction made of task gradients, but {self.no_rows}")

    def check_weights(self, weights: Tensor) -> None:
        """Raises unless there is one weight for each task, and for each group if there are any."""
        expected = [self.num_tasks] if self.groups is None else [len(self.groups.names), self.num_tasks]
        if list(weights.shape) != expected:
            raise ValueError(
                f"write: weights has shape {list(weights.shape)}, expected {expected}, one weight for each task"
            )
