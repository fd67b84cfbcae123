"""The Jacobian as an aggregator knows it, and a Jacobian whose rows are task gradients in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.aggregation._groups import Groups, mask_of
from mtlfast.ops._precision import product_rtol
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


class Part(NamedTuple):
    """Columns of the Jacobian that lie together, such as those of one dtype on one device.

    Attributes:
        columns: their places among all columns; None: all.
        grads: their gradients.
    """

    columns: Sequence[int] | None
    grads: TaskGradients

    def places(self) -> Sequence[int]:
        """Their places among all columns."""
        return range(len(self.grads.shapes)) if self.columns is None else self.columns

    def at(self, columns: Sequence[int]) -> Part:
        """These of its columns alone."""
        places = [self.places().index(column) for column in columns]
        return Part(columns, TaskGradients.from_rows([[row[i] for i in places] for row in self.grads.rows]))

    def without(self, tasks: Sequence[int]) -> Part:
        """The same columns with None for the gradients of these tasks."""
        rows = [[None] * len(row) if k in tasks else row for k, row in enumerate(self.grads.rows)]
        return Part(self.columns, TaskGradients.from_rows(rows, self.grads.parameters))


def parts_of(rows: Rows, parameters: Sequence[Tensor | None], apart: Sequence[torch.dtype] | None = None) -> list[Part]:
    """Splits rows of gradients by dtype and device.

    Args:
        rows: [K][T] gradients.
        parameters: the T parameters that they are gradients of; None for one whose gradients are held in another shape.
            These columns are parts of their own.
        apart: T dtypes. Columns whose entries differ come into different parts.

    Raises:
        TypeError: a gradient is not dense, or of a dtype without kernels.
    """
    if all(parameter is not None for parameter in parameters) and len(set(apart or ())) < 2:
        try:
            return [Part(None, TaskGradients.from_rows(rows, _known(parameters)))]
        except (TypeError, ValueError):
            pass  # several dtypes or devices, or what the gradients of one dtype and device raise as well
    kinds: dict[object, list[int]] = {}
    for t, parameter in enumerate(parameters):
        gradient = next((row[t] for row in rows if row[t] is not None), None)
        if gradient is not None:
            kind = (gradient.dtype, gradient.device, None if apart is None else apart[t], parameter is None)
            kinds.setdefault(kind, []).append(t)
    parts = []
    for columns in kinds.values():
        some = [tuple(row[t] for t in columns) for row in rows]
        parts.append(Part(columns, TaskGradients.from_rows(some, _known([parameters[t] for t in columns]))))
    return parts


def _known(parameters: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The parameters, or None unless all are known."""
    known = [parameter for parameter in parameters if parameter is not None]
    return known if len(known) == len(parameters) else None


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
    _parts: list[Part]  # their products add up

    def __init__(self, rows: TaskGradients | list[Part], groups: Groups | None = None) -> None:
        self._parts = [Part(None, rows)] if isinstance(rows, TaskGradients) else rows
        self.groups = groups

    @property
    def num_tasks(self) -> int:
        return self._parts[0].grads.num_tasks

    @property
    def no_rows(self) -> str | None:
        return None

    @property
    def no_state(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return self._parts[0].grads.device

    def product_rtol(self, precision: str | None = None) -> float:
        """That of the coarsest dtype, if there are several."""
        return max(product_rtol(part.grads, precision) for part in self._parts)

    @property
    def taking_part(self) -> list[int] | None:
        """The tasks that reach at least one tensor; None: all. With groups the mask says it."""
        if self.groups is not None:
            return None
        reaching = [task for task in range(self.num_tasks) if self._reaches(task)]
        return None if len(reaching) == self.num_tasks else reaching

    @property
    def mask(self) -> Tensor | None:
        """With groups, which tasks reach which group; None where all do, because gradients have no loss weights."""
        if self.groups is None:
            return None
        reached = [[False] * self.num_tasks for _ in self.groups.names]
        for part in self._parts:
            for k, row in enumerate(part.grads.rows):
                for group, gradient in zip(self.groups.at(part.places()), row, strict=True):
                    if gradient is not None:
                        reached[group][k] = True
        if all(map(all, reached)):
            return None
        return mask_of(tuple(map(tuple, reached)), self.device)

    def _reaches(self, task: int) -> bool:
        for part in self._parts:
            for gradient in part.grads.rows[task]:
                if gradient is not None:
                    return True
        return False

    def gram(self, precision: str | None = None) -> Tensor:
        return _sum([self._of(part, partial(ops.gram, precision=precision)) for part in self._parts])

    def norms(self, order: int = 2) -> Tensor:
        norms = [self._of(part, partial(ops.norms, order=order)) for part in self._parts]
        return norms[0] if len(norms) == 1 else _sum([x.pow(order) for x in norms]).pow(1 / order)

    def _of(self, part: Part, op: Callable[..., Tensor]) -> Tensor:
        """What an op computes of a part's gradients, for each group if there are any, on the first part's device."""
        if self.groups is None:
            return op(part.grads).to(self.device)
        return op(part.grads, groups=self.groups.at(part.places()), num_groups=len(self.groups.names)).to(self.device)

    def rows(self) -> TaskGradients:
        """The task gradients."""
        (part,) = self._parts
        return part.grads


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
