"""The Jacobian as an aggregator knows it, and task gradients at hand as one."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.task_gradients import TaskGradients


class AsksJacobian(Protocol):
    """What an aggregator may ask; `mtlfast.jacobian.Jacobian` says what each answer is."""

    @property
    def num_tasks(self) -> int:
        """K."""

    @property
    def holds_rows(self) -> bool:
        """Can it give `rows()`?"""

    @property
    def device(self) -> torch.device:
        """Of the gradients."""

    @property
    def rtol(self) -> float:
        """The relative precision of the products, for decisions about ranks."""

    def gram(self) -> Tensor:
        """[K, K] float64."""

    def norms(self) -> Tensor:
        """[K] float64."""

    def rows(self) -> TaskGradients:
        """The task gradients."""


class RowsJacobian:
    """Task gradients that are held: the kernels answer.

    Args:
        rows: K tasks x T tensors.
    """

    holds_rows: ClassVar[bool] = True
    _num_tasks: int
    _rows: TaskGradients

    def __init__(self, rows: TaskGradients) -> None:
        """See the class."""
        self._rows, self._num_tasks = rows, rows.num_tasks

    @property
    def num_tasks(self) -> int:
        """K."""
        return self._num_tasks

    @property
    def device(self) -> torch.device:
        """The gradients'."""
        return self._rows.device

    @property
    def rtol(self) -> float:
        """K times the relative precision of a product of such gradients."""
        exact = self._rows.dtype == torch.float64
        return self.num_tasks * (torch.finfo(torch.float64).eps if exact else 1e-6)

    def gram(self) -> Tensor:
        """One read of K * P."""
        return ops.gram(self._rows)

    def norms(self) -> Tensor:
        """One read of K * P."""
        return ops.norms(self._rows)

    def rows(self) -> TaskGradients:
        """The task gradients."""
        return self._rows
