"""The Jacobian as an aggregator knows it, and task gradients at hand as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.ops._precision import product_rtol
from mtlfast.task_gradients import Rows, TaskGradients


class AsksJacobian(Protocol):
    """What an aggregator may ask; `mtlfast.jacobian.Jacobian` says what each answer is."""

    @property
    def num_tasks(self) -> int:
        """K."""

    @property
    def no_rows(self) -> str | None:
        """Why it cannot give `rows()`, as the end of a sentence; None: it can."""

    @property
    def device(self) -> torch.device:
        """Of the gradients."""

    def product_rtol(self, precision: str | None = None) -> float:
        """The relative precision of a product of two gradients; a decision about ranks takes K times that."""

    @property
    def taking_part(self) -> list[int] | None:
        """The rows of the tasks that have a part in the direction, as far as the host can see; None: all."""

    @property
    def mask(self) -> Tensor | None:
        """[K] bool, which of them have one as only the device can see; None: all."""

    def gram(self, precision: str | None = None) -> Tensor:
        """[K, K] float64, its sums as `mtlfast.ops.gram` has them."""

    def norms(self) -> Tensor:
        """[K] float64."""

    def rows(self) -> TaskGradients:
        """The task gradients."""


class Part(NamedTuple):
    """The columns of one dtype: which of all they are (None: all), and their gradients."""

    columns: Sequence[int] | None
    grads: TaskGradients


def parts_of(rows: Rows, parameters: Sequence[Tensor], refuse: Callable[[], None]) -> list[Part]:
    """Rows of one dtype or several, as task gradients of each.

    Args:
        rows: [K][T] gradients.
        parameters: the T parameters that they are gradients of.
        refuse: called where the rows are not of one dtype, to raise the caller's sentence for what are no dense rows.
    """
    try:
        return [Part(None, TaskGradients.from_rows(rows, parameters))]
    except TypeError:
        refuse()
    of_dtype: dict[torch.dtype, list[int]] = {}
    for t in range(len(parameters)):
        gradient = next((row[t] for row in rows if row[t] is not None), None)
        if gradient is not None:
            of_dtype.setdefault(gradient.dtype, []).append(t)
    parts = []
    for columns in of_dtype.values():
        some = [tuple(row[t] for t in columns) for row in rows]
        parts.append(Part(columns, TaskGradients.from_rows(some, [parameters[t] for t in columns])))
    return parts


def refuse_sparse(caller: str, rows: Rows, names: Sequence[str], instead: str) -> None:
    """One sentence if a gradient is not dense."""
    for row in rows:
        for name, gradient in zip(names, row, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise ValueError(
                    f"{caller}: the gradient of {name} has layout {gradient.layout}, expected a dense one; {instead}"
                )


class RowsJacobian:
    """Task gradients that are held: the kernels answer.

    Args:
        rows: K tasks x T tensors; or parts of several dtypes.
    """

    _parts: list[Part]  # one for each dtype; their products add up

    def __init__(self, rows: TaskGradients | list[Part]) -> None:
        self._parts = [Part(None, rows)] if isinstance(rows, TaskGradients) else rows

    @property
    def num_tasks(self) -> int:
        """K."""
        return self._parts[0].grads.num_tasks

    @property
    def no_rows(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return self._parts[0].grads.device

    def product_rtol(self, precision: str | None = None) -> float:
        """Of the coarsest dtype, where there are two."""
        return max(product_rtol(part.grads, precision) for part in self._parts)

    @property
    def taking_part(self) -> list[int] | None:
        """A task that reaches none of the tensors has no part in their direction."""
        reaching = [task for task in range(self.num_tasks) if self._reaches(task)]
        return None if len(reaching) == self.num_tasks else reaching

    @property
    def mask(self) -> Tensor | None:
        """Rows at hand have no loss weights."""
        return None

    def _reaches(self, task: int) -> bool:
        for part in self._parts:
            for gradient in part.grads.rows[task]:
                if gradient is not None:
                    return True
        return False

    def gram(self, precision: str | None = None) -> Tensor:
        return _sum([ops.gram(part.grads, precision=precision) for part in self._parts])

    def norms(self) -> Tensor:
        norms = [ops.norms(part.grads) for part in self._parts]
        return norms[0] if len(norms) == 1 else _sum([x.square() for x in norms]).sqrt()

    def rows(self) -> TaskGradients:
        """The task gradients."""
        (part,) = self._parts
        return part.grads


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
