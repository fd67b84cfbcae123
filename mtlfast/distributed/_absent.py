"""A rank that has no task in a step, and still takes part in it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Columns
from mtlfast._losses import Present
from mtlfast.jacobian._rows import StoredRows


class NoTasks(StoredRows):
    """A Jacobian without rows.

    Args:
        number: the number of all tasks.
        shared: the shared parameters.
    """

    way: ClassVar[str] = "stored"

    def __init__(self, number: int, shared: Columns) -> None:
        super().__init__(Present(number, (), None, [], [], []), shared)
        self._others = _grad.PlainGradients([], apart=True)

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Does nothing."""
