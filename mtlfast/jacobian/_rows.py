"""`StoredRows`: a Jacobian whose K rows are in memory, whichever backward passes they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mtlfast import _grad, ops
from mtlfast._arguments import Columns
from mtlfast._losses import Present
from mtlfast.aggregation import AsksPart, Part, RowsJacobian, do_nothing, parts_of
from mtlfast.aggregation._jacobian import refuse_sparse
from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._collected import Collected
from mtlfast.jacobian._sparse import Places, has_sparse, held_dense, stored
from mtlfast.ops._check import check_dtype
from mtlfast.task_gradients import Rows, TaskGradients


class StoredRows(RowsJacobian, Jacobian):
    """The part of a way to compute J that is the same for all ways which hold its rows.

    A subclass runs the backward passes in `obtain`, passes each task's gradients through `keep`, and gives all of them
    to `hold`. It sets `_others`, the gradients of the leaves that are not shared, and `_mask` if only the device knows
    which tasks take part.

    The rows are kept in parts of one dtype and one device, whose Gram matrices add up. Sparse gradients are a part of
    their own, which holds the elements that at least one task touches.

    Args:
        present: the K present tasks.
        shared: the shared parameters that require grad, of any dtypes and on any devices. None: `take` finds them.
        storage_dtype: the dtype in which the gradients are stored. None: that in which autograd makes them.

    Raises:
        TypeError: `storage_dtype` is not float32, float64, bfloat16 or float16.
    """

    columns_are: ClassVar[str] = "the shared parameters"  # what errors call the columns of J
    _others: _grad.PlainGradients

    def __init__(self, present: Present, shared: Columns | None, storage_dtype: torch.dtype | None = None) -> None:
        if storage_dtype is not None:
            check_dtype("backward", storage_dtype, "storage_dtype is")
        self.present, self.storage_dtype = present, storage_dtype
        self._set_columns(Columns([], []) if shared is None else shared)
        self._ours: list[bool] = []
        self._parts = []
        self._mask: Tensor | None = None
        self._plain_weights: Tensor | None = None  # by which the plain gradients are still to be multiplied
        self._row_weights: Tensor | None = None  # by which the rows are still to be multiplied

    def _set_columns(self, shared: Columns) -> None:
        self.parameters = tuple(shared.parameters)
        self._names = shared.names
        self._places: list[Places | None] = [None] * len(self.parameters)

    @property
    def columns(self) -> Columns:
        return Columns(list(self._names), list(self.parameters))

    @property
    def num_tasks(self) -> int:
        """K, the number of present tasks, which is known before the rows are."""
        return len(self.present.tasks)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter. What the parts on other devices answer is brought there."""
        return self.parameters[0].device

    @property
    def no_rows(self) -> str | None:
        """Says so if the parameters have several dtypes or devices, because `TaskGradients` have one of each."""
        dtypes = {str(self.storage_dtype or _grad.dtype_of(parameter)) for parameter in self.parameters}
        if len(dtypes) > 1:
            return f"{self.columns_are} are of {' and '.join(sorted(dtypes))}, expected one dtype"
        devices = {str(parameter.device) for parameter in self.parameters}
        if len(devices) > 1:
            return f"{self.columns_are} are on {' and '.join(sorted(devices))}, expected one device"
        return None

    @property
    def no_state(self) -> str | None:
        """Says so if a gradient is sparse, which is known as soon as there are gradients."""
        for name, places in zip(self._names, self._places, strict=True):
            if places is not None:
                return f"the gradient of {name} is sparse; leave it out of shared, or make its table sparse=False"
        return None

    @property
    def mask(self) -> Tensor | None:
        """Which tasks take part: the device alone knows those of a loss weight of 0, and groups differ."""
        by_group = super().mask
        if self._mask is None or by_group is None:
            return by_group if self._mask is None else self._mask.expand(self._leading(self.num_tasks))
        return self._mask & by_group

    def _leading(self, *shape: int) -> tuple[int, ...]:
        """The shape with the dimension of the groups, if there are any."""
        return shape if self.groups is None else (len(self.groups.names), *shape)

    def _tasks_with_weight(self, weights: Tensor) -> Sequence[int]:
        """The tasks that need a backward pass.

        If the host cannot read them or there are none, it sets the mask instead.
        """
        assert self.losses is not None
        mask = (weights != 0) | ~self.losses.isfinite()
        if weights.device.type == "cpu" and (places := mask.nonzero().flatten().tolist()):  # host: a CPU tensor
            return places
        self._mask = mask
        return range(self.num_tasks)

    def keep(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """One task's gradients of the shared parameters as they are stored.

        It is called as soon as the task's backward pass has made them, so that with a `storage_dtype` one task's
        gradients at a time are in memory in their own dtype.
        """
        return tuple(None if g is None else stored(g, self.storage_dtype) for g in gradients)

    def hold(self, rows: Rows) -> None:
        """Takes the gradients of the shared parameters.

        Args:
            rows: [K][T] the tasks' gradients, or None where a task does not reach a parameter. A gradient to which the
                caller keeps no second reference may become `.grad`.

        Raises:
            ValueError: a gradient is neither dense nor a sparse COO tensor.
        """
        self._ours = _grad.exclusive(rows)
        self._places = [None] * len(self.parameters)
        targets = None if self.storage_dtype is None else [_grad.dtype_of(parameter) for parameter in self.parameters]
        try:
            self._parts = parts_of(rows, self.parameters, targets)
            return
        except TypeError:
            if not has_sparse(rows):
                refuse_sparse("backward", rows, self._names, "leave it out of shared")
                raise
        columns: list[Sequence[Tensor | None]] = list(zip(*rows, strict=True))
        for t, column in enumerate(columns):
            if any(gradient is not None and gradient.is_sparse for gradient in column):
                columns[t], self._places[t], self._ours[t] = held_dense(column)
        held = tuple(zip(*columns, strict=True))
        refuse_sparse("backward", held, self._names, "leave it out of shared")
        like = [p if places is None else None for p, places in zip(self.parameters, self._places, strict=True)]
        self._parts = parts_of(held, like, targets)

    def rows(self) -> TaskGradients:
        """The task gradients, for element-wise methods.

        Of a parameter whose gradients are sparse they hold the U touched places, [U, ...]. `parameters` is then None,
        because state of a parameter's shape would not fit them.
        """
        self._multiply_rows()
        parts = self._stored_parts()
        if len(parts) == 1 and parts[0].columns is None:
            return parts[0].grads
        return TaskGradients.from_rows(self._all_rows(), None if any(self._places) else self.parameters)

    def _all_rows(self) -> list[list[Tensor | None]]:
        """The gradients [K][T] that are in memory."""
        rows: list[list[Tensor | None]] = [[None] * len(self.parameters) for _ in range(self.num_tasks)]
        for part in self._stored_parts():
            for row, of_part in zip(rows, part.grads.rows, strict=True):
                for t, gradient in zip(part.places(), of_part, strict=True):
                    row[t] = gradient
        return rows

    def obtain_into(
        self, receive: Callable[[int, Sequence[Tensor | None]], None], loss_weights: Tensor | None = None
    ) -> None:
        """Runs the backward passes as `obtain` does, and hands over each row instead of holding it.

        Args:
            receive: takes the number of a row and its gradients, which nothing here holds any more.
            loss_weights: as in `obtain`.
        """
        self.obtain(loss_weights)
        self._multiply_rows()
        rows = self._all_rows()
        for t, places in enumerate(self._places):
            if places is not None:  # the rows hold the touched places alone
                for row in rows:
                    row[t] = None if (held := row[t]) is None else places.tensor(held)
        self._parts = []
        for k in range(self.num_tasks):
            row, rows[k] = rows[k], []
            receive(k, row)

    def _stored_parts(self) -> list[Part]:
        """The parts whose gradients are in memory."""
        return [part for part in self._parts if isinstance(part, Part)]

    def take(self, collected: Collected, apart: bool) -> None:
        """Takes over all gradients that were collected, and finds the shared parameters if they are not known.

        Args:
            collected: where they are; they are no longer kept there.
            apart: keep the plain gradients apart by task, for `weigh` or `scale`.
        """
        self._set_columns(collected.shared())
        rows = collected.take_rows(self.parameters, self.present.tasks)
        self._others = collected.take_plain(self.present.tasks, apart)
        self.hold(rows)

    def weigh(self, loss_weights: Tensor) -> None:
        """Multiplies the rows by loss weights, and keeps these for the plain gradients.

        A task whose loss weight is 0 does not take part, unless its loss is not finite, so that `.grad` shows it.
        """
        assert self.losses is not None
        mask = (loss_weights != 0) | ~self.losses.isfinite()
        absent: list[int] = []
        if mask.device.type == "cpu" and bool(mask.any()):
            absent = mask.logical_not().nonzero().flatten().tolist()  # host: a CPU tensor
        else:
            self._mask = mask
        self._others.leave_out(absent)
        if absent:
            self._parts = [part.without(absent) for part in self._parts]
        self.scale(loss_weights)

    def scale(self, factors: Tensor) -> None:
        """Multiplies each task's gradients by a factor. What is asked or written takes it into account.

        Args:
            factors: [K].
        """
        self._plain_weights = factors if self._plain_weights is None else self._plain_weights * factors
        self._row_weights = self._weighed(factors.double().to(self.device))

    def _weighed(self, factors: Tensor) -> Tensor:
        """[K] factors of the rows as they are in memory, for factors of the rows as `scale` multiplied them."""
        return factors if self._row_weights is None else self._row_weights * factors.double().to(self.device)

    def _multiply_rows(self) -> None:
        """Multiplies the rows in memory as `scale` was told to."""
        if self._row_weights is None:
            return
        multiplied = []
        with torch.no_grad():
            for part in self._stored_parts():
                grads, ours = part.grads, [self._ours[t] for t in part.places()]
                if not all(ours):  # what autograd or the user still holds must not be overwritten
                    rows = [
                        [g if g is None or own else g.clone() for g, own in zip(row, ours, strict=True)]
                        for row in grads.rows
                    ]
                    grads = TaskGradients.from_rows(rows, grads.parameters)
                multiplied.append(Part(part.columns, ops.scale_(grads, self._row_weights.to(grads.device))))
        self._parts = multiplied
        self._ours = [True] * len(self._ours)
        self._row_weights = None

    def gram(self, precision: str | None = None) -> Tensor:
        gram, weights = super().gram(precision), self._row_weights
        return gram if weights is None else gram * weights.outer(weights)

    def products(self, first: int, precision: str | None = None) -> Tensor:
        """The products [first, K - first] of the first rows with the other ones, for each group, float64."""
        products = torch.zeros(self._leading(first, self.num_tasks - first), dtype=torch.float64, device=self.device)
        for part in self._stored_parts():
            one, other = (TaskGradients.from_rows(rows) for rows in (part.grads.rows[:first], part.grads.rows[first:]))
            grouped = part.grouped(self.groups)
            products += ops.gram(one, other=other, precision=precision, **grouped).to(self.device)
        weights = self._row_weights
        return products if weights is None else products * weights[:first].outer(weights[first:])

    def norms(self, order: int = 2) -> Tensor:
        norms = super().norms(order)
        return norms if self._row_weights is None else norms * self._row_weights.abs()

    def norms_at(self, layers: Sequence[Tensor] | None = None, order: int = 2) -> Tensor:
        norms = RowsJacobian(self._parts_at(layers)).norms(order=order).to(self.device)
        return norms if self._row_weights is None else norms * self._row_weights.abs()

    def _parts_at(self, layers: Sequence[Tensor] | None) -> Sequence[AsksPart]:
        """The parts without the columns of other parameters than these; None: all."""
        if layers is None:
            return self._parts
        wanted = {id(layer) for layer in layers}
        return [part.at([t for t in part.places() if id(self.parameters[t]) in wanted]) for part in self._parts]

    @property
    def written(self) -> list[Tensor]:
        """The leaves that at least one task reaches."""
        reached = []
        for part in self._parts:
            by_a_task = zip(*(part.reached(k) for k in range(self.num_tasks)), strict=True)
            reached += [self.parameters[t] for t, by in zip(part.places(), by_a_task, strict=True) if any(by)]
        return [*reached, *self._others.reached()]

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        self.check_weights(weights)
        with torch.no_grad():
            pending = self._plain(loss_weights)
            weights = self._weighed(weights)
            for part in self._parts:
                pending += self._written(part, weights)
            _grad.commit(pending)

    def _written(self, part: AsksPart, weights: Tensor) -> _grad.Pending:
        """The writes that add w J to `.grad` of a part's parameters, for weights of the rows as they are in memory."""
        assert isinstance(part, Part)
        columns = part.places()
        parameters = [self.parameters[t] for t in columns]
        ours = [self._ours[t] for t in columns]
        dtype = None if self.storage_dtype is None else _grad.dtype_of(parameters[0])
        finish = [places.tensor for t in columns if (places := self._places[t]) is not None]
        groups = None if self.groups is None else self.groups.at(columns)
        return _grad.weighted(parameters, part.grads, weights, ours, dtype, finish, groups)

    def put(
        self,
        direction: Sequence[Tensor | None],
        loss_weights: Tensor | None = None,
        finish: Callable[[], None] = do_nothing,
    ) -> None:
        with torch.no_grad():
            pending = self._plain(loss_weights)
            if any(self._places) or _grad.any_sparse(self.parameters):
                finish()  # the values themselves are needed below
                finish = do_nothing
            whole = [
                x if x is None or places is None else places.tensor(x.to(_grad.dtype_of(parameter)))
                for x, places, parameter in zip(direction, self._places, self.parameters, strict=True)
            ]
            pending += _grad.prepared(self.parameters, whole, [True] * len(self.parameters))
            finish()
            _grad.commit(pending)

    def _plain(self, loss_weights: Tensor | None) -> _grad.Pending:
        """The writes of the plain gradients of all other leaves."""
        return self._others.prepared(self._times_before(loss_weights))

    def plain_sums(self, loss_weights: Tensor | None) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        """All other leaves, and the sum over the tasks of each one's plain gradients."""
        return self._others.leaves, self._others.summed(self._times_before(loss_weights))

    @property
    def other_leaves(self) -> Sequence[Tensor]:
        """The leaves that get plain gradients; empty if they are not known before the passes."""
        return self._others.leaves if hasattr(self, "_others") else ()

    def leave_out_plain(self, rows: Sequence[int]) -> None:
        """Drops the plain gradients of these rows, which were kept apart."""
        self._others.leave_out(rows)

    def _times_before(self, loss_weights: Tensor | None) -> Tensor | None:
        before = self._plain_weights
        return loss_weights if before is None else before if loss_weights is None else before * loss_weights
