"""The Jacobian of several ranks: that of the mean of their losses, from each rank's own Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from mtlfast import _grad, ops
from mtlfast._losses import Present
from mtlfast.aggregation import AsksPart, Part, RowsJacobian, do_nothing, parts_of
from mtlfast.distributed._agreement import common_dtype, dtype_number
from mtlfast.distributed._plain_gradients import AveragedGradients
from mtlfast.distributed._ranks import Ranks
from mtlfast.distributed._reached import if_dense, kind_of, reached_on_a_rank
from mtlfast.distributed._reduction import Kind, Reduction
from mtlfast.jacobian import Plan
from mtlfast.jacobian._rows import StoredRows
from mtlfast.ops._precision import EXACT_ELEMENTS, EXACT_TASKS
from mtlfast.ops.combine import write
from mtlfast.task_gradients import Rows, TaskGradients


class RankedJacobian(StoredRows):
    """A Jacobian whose rows are the means of several ranks' task gradients, in parts that lie on the ranks.

    It runs the backward passes of another Jacobian and hands each row to a reduction. Gram matrices and norms are those
    of this rank's part, summed over the ranks, so that all ranks compute the same weights. A task that is absent on a
    rank counts as zeros there.

    Args:
        local: the Jacobian of this rank's losses, with one row for each task that is present here.
        ranks: the ranks.
        present: the tasks that are present on at least one rank.
        reduction: how the rows become those of all ranks.
        others: the parameters that are not shared and whose plain gradients are averaged; None: those that are found.
        storage_dtype: the dtype in which the rows are kept; None: that of the gradients.
        loss_dtype: the dtype of the mean losses; None: the losses are known only after the backward passes.
    """

    way: ClassVar[str] = "ranks"

    def __init__(
        self,
        local: StoredRows,
        ranks: Ranks,
        present: Present,
        reduction: Reduction,
        others: Sequence[Tensor] | None,
        storage_dtype: torch.dtype | None,
        loss_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(present, local.columns, storage_dtype)
        self._local, self._ranks, self._reduction = local, ranks, reduction
        task_of = [present.tasks.index(task) for task in local.present.tasks]
        self._task_of = task_of  # by the rows of this rank
        self._there = [[kind_of(None)] * len(self.parameters) for _ in present.tasks]  # which gradients this rank has
        self._started = 0
        self._averaged = AveragedGradients(local, task_of, ranks, others)
        if loss_dtype is not None:
            self._average_losses(loss_dtype)

    @property
    def plan(self) -> Plan:
        plan = self._local.plan
        where = f"the mean over {self._ranks.size} ranks"
        return replace(plan, reason=f"{where}; {plan.reason}" if plan.reason else where)

    @property
    def no_rows(self) -> str | None:
        if len(self._reduction.kinds()) > 1:
            return "the shared parameters are placed on the ranks in several ways"
        return self._local.no_rows

    @property
    def no_state(self) -> str | None:
        return self._local.no_state

    def _average_losses(self, dtype: torch.dtype) -> None:
        """Sets the losses' means. A loss that is absent on a rank counts as 0 there, as its gradient does."""
        values = torch.zeros(self.num_tasks, dtype=torch.float64, device=self.device)
        own = self._local.losses
        if own is not None:
            values[self._task_of] = own.to(values.device, values.dtype) / self._ranks.size
        self.losses = self._ranks.sum("the mean of the losses", values).to(dtype)
        if own is not None:  # a loss that is not finite on one rank is so on all, which then run the same passes
            self._local.losses = self.losses[self._task_of]

    def _late_dtype(self) -> torch.dtype:
        """The dtype of the mean losses, once each rank knows that of its own ones."""
        own = None if self._local.losses is None else self._local.losses.dtype
        number = torch.tensor([dtype_number(own)], device=self._ranks.host_device(self.device))
        numbers = self._ranks.gather("the comparison of the losses", number).flatten().tolist()
        found = common_dtype(numbers)
        assert found is not None  # some rank has the task
        return found

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Runs this rank's backward passes. The reduction of a row runs beside the next pass."""
        if self._task_of:
            self._local.obtain_into(self._take, None if loss_weights is None else loss_weights[self._task_of])
        while self._started < self.num_tasks:
            self._start([None] * len(self.parameters))
        if self.losses is None:
            self._average_losses(self._late_dtype())
        if loss_weights is not None:
            self._tasks_with_weight(loss_weights)
        self._others = self._averaged
        self.hold(tuple(map(tuple, self._reduction.rows())))

    def _take(self, row: int, gradients: Sequence[Tensor | None]) -> None:
        """Starts the reduction of a row of this rank, and of zeros for tasks before it that are absent here."""
        task = self._task_of[row]
        while self._started < task:
            self._start([None] * len(self.parameters))
        self._there[task] = [kind_of(gradient) for gradient in gradients]
        self._start([if_dense(gradient) for gradient in gradients])

    def _start(self, gradients: Sequence[Tensor | None]) -> None:
        self._reduction.start(self.present.labels[self._started], gradients)
        self._started += 1

    def hold(self, rows: Rows) -> None:
        """Takes this rank's part of the mean gradients, without those that no rank has."""
        what = "the comparison of the reached parameters"
        reached = reached_on_a_rank(self._ranks, what, self._there, self.device, self._names.__getitem__)
        self._reached = [any(of_tasks) for of_tasks in zip(*reached, strict=True)]
        if not any(self._reached):
            number = len(self.parameters)
            raise ValueError(
                f"backward: the losses reach none of the {number} shared parameters, expected at least one"
            )
        self._ours = [True] * len(self.parameters)
        stand_ins = self._reduction.stand_ins()
        self._parts = []
        for columns, _ in self._reduction.kinds():
            some = [
                [row[t] if of_task[t] else None for t in columns] for row, of_task in zip(rows, reached, strict=True)
            ]
            targets = [_grad.dtype_of(self.parameters[t]) for t in columns]
            for part in parts_of(tuple(map(tuple, some)), [stand_ins[t] for t in columns], targets):
                self._parts.append(Part([columns[i] for i in part.places()], part.grads))

    def _by_kind(self, parts: Sequence[AsksPart]) -> Iterator[tuple[Kind, list[AsksPart]]]:
        """The parts by how their products are summed."""
        for kind in self._reduction.kinds():
            if some := [part for part in parts if part.places() and part.places()[0] in kind.columns]:
                yield kind, some

    def _total(self, what: str, parts: Sequence[AsksPart], of: Callable[[RowsJacobian], Tensor]) -> Tensor:
        """The sum over all columns of what each rank computes from its part of some."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for kind, some in self._by_kind(parts):
            total = total + kind.total(what, of(RowsJacobian(some, self.groups)).contiguous()).to(self.device)
        return total

    def _summed(self, precision: str | None) -> str:
        """How products are summed, which follows from the number of all elements and not from this rank's part."""
        few = self.num_tasks <= EXACT_TASKS or sum(p.numel() for p in self.parameters) <= EXACT_ELEMENTS
        return precision or ("exact" if few else "fast")

    def product_rtol(self, precision: str | None = None) -> float:
        return super().product_rtol(self._summed(precision))

    def gram(self, precision: str | None = None) -> Tensor:
        summed, weights = self._summed(precision), self._row_weights
        gram = self._total("the sum of the Gram matrices", self._parts, lambda some: some.gram(summed))
        return gram if weights is None else gram * weights.outer(weights)

    def products(self, first: int, precision: str | None = None) -> Tensor:
        (kind,) = self._reduction.kinds()
        return kind.total("the sum of the products", super().products(first, self._summed(precision)))

    def norms(self, order: int = 2) -> Tensor:
        norms = self._norms(self._parts, order)
        return norms if self._row_weights is None else norms * self._row_weights.abs()

    def norms_at(self, layers: Sequence[Tensor] | None = None, order: int = 2) -> Tensor:
        groups, self.groups = self.groups, None  # which do not count here
        norms = self._norms(self._parts_at(layers), order)
        self.groups = groups
        return norms if self._row_weights is None else norms * self._row_weights.abs()

    def _norms(self, parts: Sequence[AsksPart], order: int) -> Tensor:
        return self._total("the sum of the norms", parts, lambda some: some.norms(order).pow(order)).pow(1 / order)

    def rows(self) -> TaskGradients:
        """This rank's part of the task gradients, for methods that work element by element."""
        self._multiply_rows()
        grads = TaskGradients.from_rows(self._all_rows(), self._reduction.stand_ins())
        grads.shards = self._reduction.shards(self._reached)
        return grads

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        self.check_weights(weights)
        direction: list[Tensor | None] = [None] * len(self.parameters)
        with torch.no_grad():
            weights = self._weighed(weights)
            for part in self._stored_parts():
                columns = part.places()
                dtype = None if self.storage_dtype is None else _grad.dtype_of(self.parameters[columns[0]])
                groups = None if self.groups is None else self.groups.at(columns)
                combined = self._combined(part, weights.to(part.device), dtype, groups)
                for t, of_column in zip(columns, combined, strict=True):
                    direction[t] = of_column
        self.put(direction, loss_weights)

    def _combined(
        self, part: Part, weights: Tensor, dtype: torch.dtype | None, groups: Sequence[int] | None
    ) -> list[Tensor | None]:
        """The weighted sums, in the memory of the first task's gradients, which are not needed afterwards."""
        if dtype is not None and dtype != part.grads.dtype:
            return ops.combine(part.grads, weights, dtype=dtype, groups=groups)
        return write(part.grads, weights, part.grads.examples(), groups=groups)

    def put(
        self,
        direction: Sequence[Tensor | None],
        loss_weights: Tensor | None = None,
        finish: Callable[[], None] = do_nothing,
    ) -> None:
        with torch.no_grad():
            pending = self._plain(loss_weights)
            finish()  # the values themselves are exchanged, so that one collective is still to come
            whole = self._reduction.whole(direction)
            pending += _grad.prepared(self.parameters, whole, [True] * len(self.parameters))
            _grad.commit(pending)
