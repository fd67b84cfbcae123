"""The Jacobian as an aggregator knows it, and a Jacobian whose rows are task gradients in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtlfast.aggregation._groups import Groups, mask_of
from mtlfast.aggregation._parts import AsksPart, Part
from mtlfast.task_gradients import Rows, TaskGradients

Products = Callable[[str | None], Tensor]  # a function of a `precision` as in `mtlfast.ops.gram`


class AsksJacobian(Protocol):
    """What an aggregator may ask of a Jacobian. `mtlfast.jacobian.Jacobian` says more about each answer."""

    @property
    def num_tasks(self) -> int:
        """K, the number of tasks."""

    @property
    def no_rows(self) -> str | None:
        """Why `rows()` is not available, as the end of a sentence; None if it is."""

    @property
    def no_state(self) -> str | None:
        """Why state for each parameter cannot be kept, as the end of a sentence; None if it can."""

    @property
    def device(self) -> torch.device:
        """The device of the gradients."""

    def product_rtol(self, precision: str | None = None) -> float:
        """The relative precision of a dot product of two gradients. Decisions about ranks take K times that."""

    @property
    def groups(self) -> Groups | None:
        """The groups of columns. Gram matrix, norms and mask then have a leading dimension [G]. None: no groups."""

    @property
    def taking_part(self) -> list[int] | None:
        """The tasks that take part in the direction, as far as the host knows; None: all."""

    @property
    def mask(self) -> Tensor | None:
        """[K] or [G, K] bool, which of the tasks take part, where that is no one list for all groups; None: all."""

    @property
    def cross_gram(self) -> Products | None:
        """Computes the products J_1 J_2^T of two batches' gradients, [K, K] float64; None if there is one batch."""

    def gram(self, precision: str | None = None) -> Tensor:
        """The Gram matrix [K, K] float64, with `precision` as in `mtlfast.ops.gram`."""

    def norms(self) -> Tensor:
        """The norms of the rows, [K] float64."""

    def rows(self) -> TaskGradients:
        """The task gradients."""


def do_nothing() -> None:
    """What finishes a direction that is written already."""


def refuse_sparse(caller: str, rows: Rows, names: Sequence[str], instead: str) -> None:
    """Raises if a gradient is not dense, and names its parameter."""
    for row in rows:
        for name, gradient in zip(names, row, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"{caller}: the gradient of {name} has layout {gradient.layout}, expected a dense one; {instead}"
                )


class RowsJacobian:
    """A Jacobian whose rows are task gradients in memory, so that the kernels compute what is asked.

    Args:
        rows: K tasks x T tensors, or its parts. What parts on several devices answer is added up on the
            device of the first.
        groups: the groups of the T columns.
    """

    cross_gram: Products | None = None
    groups: Groups | None = None
    _parts: Sequence[AsksPart]  # their products add up

    def __init__(self, rows: TaskGradients | Sequence[AsksPart], groups: Groups | None = None) -> None:
        self._parts = [Part(None, rows)] if isinstance(rows, TaskGradients) else rows
        self.groups = groups

    @property
    def num_tasks(self) -> int:
        return self._parts[0].num_tasks

    @property
    def no_rows(self) -> str | None:
        return None

    @property
    def no_state(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return self._parts[0].device

    def product_rtol(self, precision: str | None = None) -> float:
        """That of the coarsest dtype, if there are several."""
        return max(part.product_rtol(precision) for part in self._parts)

    @property
    def taking_part(self) -> list[int] | None:
        """The tasks that reach at least one tensor; None: all. With groups the mask says it."""
        if self.groups is not None:
            return None
        reaching = [task for task in range(self.num_tasks) if any(any(part.reached(task)) for part in self._parts)]
        return None if len(reaching) == self.num_tasks else reaching

    @property
    def mask(self) -> Tensor | None:
        """With groups, which tasks reach which group; None where all do, because gradients have no loss weights."""
        if self.groups is None:
            return None
        reached = [[False] * self.num_tasks for _ in self.groups.names]
        for part in self._parts:
            for k in range(self.num_tasks):
                for group, there in zip(self.groups.at(part.places()), part.reached(k), strict=True):
                    reached[group][k] |= there
        if all(map(all, reached)):
            return None
        return mask_of(tuple(map(tuple, reached)), self.device)

    def gram(self, precision: str | None = None) -> Tensor:
        return _sum([part.gram(precision, self.groups).to(self.device) for part in self._parts])

    def norms(self, order: int = 2) -> Tensor:
        norms = [part.norms(order, self.groups).to(self.device) for part in self._parts]
        return norms[0] if len(norms) == 1 else _sum([x.pow(order) for x in norms]).pow(1 / order)

    def rows(self) -> TaskGradients:
        """The task gradients."""
        (part,) = self._parts
        assert isinstance(part, Part)
        return part.grads


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
