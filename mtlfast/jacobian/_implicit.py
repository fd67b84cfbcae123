"""The implicit Jacobian: G and w J from activations and the gradients at them, without the tasks' weight gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlfast._arguments import Columns
from mtlfast._losses import Present
from mtlfast.jacobian._batched import NotBatched, batched, meeting_of, where, why_not
from mtlfast.jacobian._computed import ComputedJacobian
from mtlfast.jacobian._factored import FactoredPart
from mtlfast.jacobian._overwriting import Overwriting
from mtlfast.jacobian._plan import Plan, chosen_for, without_walk
from mtlfast.jacobian._products import Factors
from mtlfast.jacobian._sequential import Pass, Targets, sequential
from mtlfast.jacobian._uses import NO_GRAPH, Layer, Use, padding_of, walk
from mtlfast.task_gradients import Rows


class ImplicitJacobian(ComputedJacobian):
    """A Jacobian that stores no row of the layers whose gradient is a product of two matrices.

    Of such a layer the backward passes make the gradients at its output alone. The Gram matrix follows from these and
    from the layer's input, and the update is one weight gradient (`_factored.py`). All other shared parameters are
    stored as in `StoredJacobian`, in the same passes.

    Args:
        present: as in `StoredJacobian`, and so are `shared`, `retain_graph`, `loss_weights_later` and `storage_dtype`.
        mode: "implicit", or "auto" to store all rows where the implicit way gains nothing.
        memory_budget: the most bytes that task gradients and what stands in place of them may take; None: no limit.
        why_not_mixed: why tasks that are mixtures of samples have a pass each, for the plan.

    Raises:
        ValueError: as in `StoredJacobian`, or no plan keeps to the budget.
    """

    def __init__(
        self,
        present: Present,
        shared: Columns | None,
        retain_graph: bool,
        loss_weights_later: bool,
        storage_dtype: torch.dtype | None,
        mode: str,
        memory_budget: int | None,
        why_not_mixed: str = "",
    ) -> None:
        super().__init__(present, shared, retain_graph, loss_weights_later, storage_dtype)
        self._mode, K = mode, len(present.losses)
        self._graph, self._layers = NO_GRAPH, dict[int, Layer]()
        chosen = without_walk(self.parameters, K) if mode == "auto" and memory_budget is None else None
        if chosen is None:
            self._graph = walk(present.losses)
            chosen, self._layers = chosen_for(mode, self._names, self.parameters, K, self._graph, memory_budget)
        self._chosen = chosen
        if self._checks and self._graph.nodes:
            self.coarsest = self._graph.coarsest()
        self._chosen.wide.settle()
        self._plan = self._chosen.plan
        if why_not_mixed:
            self._plan = replace(self._plan, reason=f"not mixed, because {why_not_mixed}; {self._plan.reason}")
        self._factors: list[Factors] = []

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def no_rows(self) -> str | None:
        if self._mode == "implicit" or self._layers:
            return f'jacobian="{self._mode}" does not make them, expected jacobian="stored"'
        return super().no_rows

    def _passes(self, weights: Tensor | None, wanted: Sequence[int], inputs: Sequence[Tensor]) -> Iterator[Pass]:
        """The backward passes, in which the implicit layers have None for the gradients of their weights."""
        if not self._layers:
            self._graph = self._graph.without_nodes()
            yield from super()._passes(weights, wanted, inputs)
            return
        self._factors, self._pass_weights = self._read_constants(), weights
        layers = [factor.layer for factor in self._factors]
        implicit = {layer.column for layer in layers}
        ordinary = [i for i in range(len(inputs)) if i not in implicit]
        edges = [GradientEdge(use.node, 0) for layer in layers for use in layer.uses]
        targets: Targets = [*(inputs[i] for i in ordinary), *edges]
        for k, gradients in self._swept(weights, wanted, targets, frozenset(edge.node for edge in edges)):
            row: list[Tensor | None] = [None] * len(inputs)
            for i, gradient in zip(ordinary, gradients, strict=False):
                row[i] = gradient
            arrived = iter(gradients[len(ordinary) :])
            for factor in self._factors:
                factor.deltas[k] = _joined([(use, next(arrived)) for use in factor.layer.uses], factor)
            del gradients
            yield k, row
            del row
        self._graph = self._graph.without_nodes()

    def _read_constants(self) -> list[Factors]:
        """The layers' inputs. A checkpointed segment whose inputs are packed is computed once for all of it."""
        group = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
        packed = any(layer.recomputed for layer in self._layers.values())
        with contextlib.nullcontext() if group is None or not packed else group():
            return [self._factors_of(layer) for layer in self._layers.values()]

    def _factors_of(self, layer: Layer) -> Factors:
        constants = []
        for use in layer.uses:
            constant = _dense(getattr(use.node, use.constant).detach())
            if layer.kind == "embedding":
                constant = constant.reshape(-1)
            constants.append(constant.mT if use.turned else constant)
        padding = padding_of(layer.uses[0]) if layer.kind == "embedding" else -1
        joined = constants[0] if len(constants) == 1 else torch.cat(constants)
        return Factors(layer, self.parameters[layer.column], joined, [None] * self.num_tasks, padding)

    def _swept(
        self, weights: Tensor | None, wanted: Sequence[int], targets: Targets, captured: frozenset[object]
    ) -> Iterator[Pass]:
        """The passes for all targets, batched below the tensor where the losses meet if that pays."""
        losses, keep = self.present.losses, self._retain_graph or self._checks
        meeting = meeting_of(losses, self._graph, captured) if len(wanted) > 1 else None
        why = "there is one task" if len(wanted) < 2 else why_not(meeting, self._graph, self.device)
        below = None
        if why is None and not (why := self._chosen.not_batched):
            assert meeting is not None
            below = where(targets, meeting, self._graph)
            why = "a leaf is reached both below and beside the tensor where the losses meet" if below is None else ""
        if meeting is not None and below is not None:
            passes = batched(losses, weights, wanted, targets, keep, meeting, below, self._chosen)
            try:
                first = next(passes)
            except NotBatched as error:
                self._chosen.not_batched = why = str(error)
            else:
                self._plan = replace(self._plan, sweep="batched", sweep_reason="all losses meet at one tensor")
                yield first
                del first
                yield from passes
                return
        self._plan = replace(self._plan, sweep="sequential", sweep_reason=why or "")
        overwriting = Overwriting(self._reached, [losses[k] for k in wanted])
        yield from sequential(losses, weights, wanted, targets, keep, overwriting)

    def hold(self, rows: Rows) -> None:
        super().hold(rows)
        if not self._factors:
            return
        kinds: dict[object, list[Factors]] = {}
        for factor in self._factors:
            kinds.setdefault((factor.layer.dtype, factor.parameter.device), []).append(factor)
        parts = [FactoredPart(of, self.num_tasks, self._chosen.wide) for of in kinds.values()]
        self._compute(parts, self._chosen.wide)
        self._factors = []


def _joined(uses: Sequence[tuple[Use, Tensor | None]], factor: Factors) -> Tensor | None:
    """One task's gradients at a layer's outputs, one use below the other; zeros for a use that it does not reach."""
    width = factor.layer.delta_size
    parts = [None if x is None else (_dense(x).mT if use.turned else _dense(x).reshape(-1, width)) for use, x in uses]
    if all(part is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    example = next(part for part in parts if part is not None)
    zeros = [example.new_zeros(use.rows, width) for use, _ in uses]
    return torch.cat([zero if part is None else part for zero, part in zip(zeros, parts, strict=True)])


def _dense(x: Tensor) -> Tensor:
    """An input or a gradient of a layer, which may be sparse, as a strided tensor."""
    return x if x.layout == torch.strided else x.to_dense()
