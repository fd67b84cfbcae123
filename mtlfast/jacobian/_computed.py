"""What the ways have in common that compute products of task gradients without having these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Columns
from mtlfast._losses import Present
from mtlfast.aggregation import AsksPart, Groups, Part
from mtlfast.jacobian._certificate import certify
from mtlfast.jacobian._products import Wide
from mtlfast.jacobian._stored import StoredJacobian
from mtlfast.task_gradients import TaskGradients


class ComputedPart(AsksPart, Protocol):
    """Columns whose rows are not in memory, but whose products and weighted sums can be computed."""

    def combined(self, weights: Tensor, groups: Groups | None) -> list[Tensor | None]:
        """w J, one tensor for each column, or None if no task reaches it.

        Args:
            weights: [K], or [G, K] with groups.
            groups: those of all columns.
        """

    def without_cross(self, precision: str | None, groups: Groups | None) -> Tensor | None:
        """As in `Wide.note_gram`; None: the diagonal of `gram`."""

    def at(self, columns: Sequence[int]) -> ComputedPart:
        """These of its columns alone."""


class ComputedJacobian(StoredJacobian):
    """A Jacobian some of whose columns are not in memory.

    A subclass gives its parts to `_compute` in `obtain`, with the object that remembers which products need float64.

    Attributes:
        coarsest: the dtype of least precision in the graph, which the subclass sets if `_checks`.
    """

    coarsest: torch.dtype

    def __init__(
        self,
        present: Present,
        shared: Columns | None,
        retain_graph: bool,
        loss_weights_later: bool,
        storage_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(present, shared, retain_graph, loss_weights_later, storage_dtype=storage_dtype)
        self._checks = os.environ.get("MTLFAST_CHECK", "0") not in ("", "0")  # which keeps the graph
        self._computed: Sequence[ComputedPart] = ()
        self._wide = Wide()
        self._pass_weights: Tensor | None = None  # by which the losses were multiplied in the passes

    def _compute(self, parts: Sequence[ComputedPart], wide: Wide) -> None:
        """Takes the parts that are not in memory, beside those that are."""
        stored = [part for part in self._stored_parts() if any(any(part.reached(k)) for k in range(self.num_tasks))]
        self._computed, self._wide = parts, wide
        self._parts = [*stored, *parts]

    def gram(self, precision: str | None = None) -> Tensor:
        gram = super().gram(precision)
        if precision != "exact" or not self._computed:
            return gram
        scales = [part.without_cross(precision, self.groups) for part in self._parts_computed()]
        scale = None
        if known := [x.to(self.device) for x in scales if x is not None]:
            scale = torch.stack(known).sum(dim=0)
            if self._row_weights is not None:
                scale = scale * self._row_weights.outer(self._row_weights)
        return super().gram(precision) if self._wide.note_gram(gram, scale) else gram

    def _parts_computed(self) -> list[ComputedPart]:
        """The parts that are not in memory, without the tasks that `weigh` has left out."""
        return [part for part in self._parts if not isinstance(part, Part)]  # type: ignore[misc]

    def rows(self) -> TaskGradients:
        if self._computed:
            raise TypeError(f"rows: expected task gradients in memory, but {self.no_rows}")
        return super().rows()

    def _written(self, part: AsksPart, weights: Tensor) -> _grad.Pending:
        if isinstance(part, Part):
            return super()._written(part, weights)
        computed: ComputedPart = part  # type: ignore[assignment]
        parameters = [self.parameters[t] for t in computed.places()]
        return _grad.prepared(parameters, computed.combined(weights, self.groups), [True] * len(parameters))

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        if self._checks and self._computed:
            self.check_weights(weights)
            self._certify(weights)
        super().write(weights, loss_weights)

    def _certify(self, weights: Tensor) -> None:
        """Compares what is about to be written with ordinary backward passes."""
        certify(self, self._weighed(weights), self._parts_computed())

    def weighted_pass(self, weights: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of the parameters by one ordinary backward pass of the weighted sum of the losses."""
        assert self._checks
        factors = [w.to(loss.device, loss.dtype) for w, loss in zip(weights, self.present.losses, strict=True)]
        if self._pass_weights is not None:
            factors = [x * w.to(x.device, x.dtype) for x, w in zip(factors, self._pass_weights, strict=True)]
        with torch.enable_grad():
            return torch.autograd.grad(self.present.losses, parameters, factors, retain_graph=True, allow_unused=True)
