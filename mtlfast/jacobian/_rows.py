"""`StoredRows`: a Jacobian whose K rows are in memory, whichever backward passes they came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Columns
from mtlfast.aggregation import RowsJacobian
from mtlfast.aggregation._jacobian import parts_of, refuse_sparse
from mtlfast.jacobian._base import Jacobian
from mtlfast.task_gradients import Rows


class StoredRows(RowsJacobian, Jacobian):
    """The part of a way to compute J that is the same for all ways which hold its rows.

    A subclass runs the backward passes in `obtain` and ends that with `hold`. It sets `_others`, the gradients of the
    leaves that are not shared, and `_mask` if only the device knows which tasks take part.

    Args:
        shared: the shared parameters that require grad. They may have several dtypes, which their gradients keep.
    """

    _others: _grad.PlainGradients

    def __init__(self, shared: Columns) -> None:
        self.parameters = tuple(shared.parameters)
        self._names = shared.names
        self._ours: list[bool] = []
        self._mask: Tensor | None = None

    @property
    def no_rows(self) -> str | None:
        """Says so if the parameters have several dtypes, because `TaskGradients` have one."""
        dtypes = sorted({str(_grad.dtype_of(parameter)) for parameter in self.parameters})
        return None if len(dtypes) == 1 else f"the shared parameters are of {' and '.join(dtypes)}, expected one dtype"

    @property
    def mask(self) -> Tensor | None:
        """[K] bool if only the device knows which tasks take part; None: all."""
        return self._mask

    def hold(self, rows: Rows) -> None:
        """Takes the gradients of the shared parameters.

        Args:
            rows: [K][T] the tasks' gradients, or None where a task does not reach a parameter. A gradient to which the
                caller keeps no second reference may become `.grad`.

        Raises:
            ValueError: a gradient is sparse.
        """
        self._ours = _grad.exclusive(rows)
        instead = "pass sparse=False to the embedding, or leave it out of shared"
        self._parts = parts_of(rows, self.parameters, lambda: refuse_sparse("backward", rows, self._names, instead))

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        self.check_weights(weights)
        with torch.no_grad():
            pending = self._others.prepared(loss_weights)
            for columns, grads in self._parts:
                ours = self._ours if columns is None else [self._ours[t] for t in columns]
                assert grads.parameters is not None
                pending += _grad.weighted(grads.parameters, grads, weights, ours)
            _grad.commit(pending)

    def put(self, direction: Sequence[Tensor | None], loss_weights: Tensor | None = None) -> None:
        with torch.no_grad():
            pending = self._others.prepared(loss_weights)
            pending += _grad.prepared(self.parameters, direction, [True] * len(self.parameters))
            _grad.commit(pending)
