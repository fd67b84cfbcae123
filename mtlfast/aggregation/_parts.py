"""Parts of a Jacobian: some of its columns, whose share of every product adds up with that of the other columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.aggregation._groups import Groups
from mtlfast.ops._precision import product_rtol
from mtlfast.task_gradients import Rows, TaskGradients


class AsksPart(Protocol):
    """What a Jacobian asks of some of its columns, which lie on one device."""

    @property
    def num_tasks(self) -> int:
        """K, the number of tasks."""

    @property
    def device(self) -> torch.device:
        """The device of what the part answers."""

    def places(self) -> Sequence[int]:
        """The columns' places among all columns."""

    def reached(self, task: int) -> Iterator[bool]:
        """For each of the columns, whether a task reaches it."""

    def gram(self, precision: str | None, groups: Groups | None) -> Tensor:
        """The Gram matrix of these columns, [K, K] or [G, K, K] float64."""

    def norms(self, order: int, groups: Groups | None) -> Tensor:
        """The norms of the rows over these columns, [K] or [G, K] float64."""

    def product_rtol(self, precision: str | None) -> float:
        """The relative precision of the dot product of two rows."""

    def at(self, columns: Sequence[int]) -> AsksPart:
        """These of its columns alone."""

    def without(self, tasks: Sequence[int]) -> AsksPart:
        """The same columns, which these tasks do not reach."""


class Part(NamedTuple):
    """Columns whose gradients are in memory, such as those of one dtype on one device.

    Attributes:
        columns: their places among all columns; None: all.
        grads: their gradients.
    """

    columns: Sequence[int] | None
    grads: TaskGradients

    @property
    def num_tasks(self) -> int:
        return self.grads.num_tasks

    @property
    def device(self) -> torch.device:
        return self.grads.device

    def places(self) -> Sequence[int]:
        """Their places among all columns."""
        return range(len(self.grads.shapes)) if self.columns is None else self.columns

    def reached(self, task: int) -> Iterator[bool]:
        return (gradient is not None for gradient in self.grads.rows[task])

    def gram(self, precision: str | None, groups: Groups | None) -> Tensor:
        return ops.gram(self.grads, precision=precision, **self.grouped(groups))

    def norms(self, order: int, groups: Groups | None) -> Tensor:
        return ops.norms(self.grads, order=order, **self.grouped(groups))

    def product_rtol(self, precision: str | None) -> float:
        return product_rtol(self.grads, precision)

    def grouped(self, groups: Groups | None) -> dict[str, Any]:
        """The arguments by which ops keep the groups apart."""
        return {} if groups is None else {"groups": groups.at(self.places()), "num_groups": len(groups.names)}

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
