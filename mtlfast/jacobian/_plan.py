"""How each shared parameter's part of the Jacobian is computed, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mtlfast import _grad
from mtlfast.jacobian._products import Wide
from mtlfast.jacobian._uses import Graph, Layer, layer_of

SMALL = 2**20  # elements of all gradients, below which a walk of the graph often takes longer than it saves
WORTH = 0.05  # of the FLOPs of all layers: below that "auto" stores all rows, because the walk costs time as well


class OverBudget(ValueError):
    """No plan keeps to the budget of memory."""


@dataclass(frozen=True)
class LayerPlan:
    """How one shared parameter's part of the Jacobian is computed.

    Attributes:
        name: the parameter's name.
        way: "implicit", from the gradients at the layer's output and its input, or "ordinary", by autograd.
        reason: why.
        rows: N, the number of rows of the layer's input; None if the parameter is used in another form.
        flops: the floating-point operations that the way is predicted to take beyond the input gradients, which both
            ways need; None if they were not predicted.
        ordinary_flops: those of the ordinary way.
        memory: the bytes that the way is predicted to keep until the gradients are written.
    """

    name: str
    way: str
    reason: str
    rows: int | None
    flops: int | None
    ordinary_flops: int | None
    memory: int


@dataclass(frozen=True)
class Plan:
    """How a step computes the task gradients. `print(plan)` shows it as a table.

    Attributes:
        way: "stored", "implicit", "mixing", "closures", "accumulated", "features" or "two batches" (`StepResult`).
        reason: why, where `jacobian="auto"` or "implicit" had to choose; otherwise "".
        sweep: "batched" if one backward pass takes the gradients of all tasks through the trunk, "sequential" if there
            is one for each task; "" if nothing had to be chosen.
        sweep_reason: why.
        layers: the shared parameters in their order; empty if nothing had to be chosen.
    """

    way: str
    reason: str = ""
    sweep: str = ""
    sweep_reason: str = ""
    layers: tuple[LayerPlan, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.way}: {self.reason}" if self.reason else self.way]
        if self.sweep:
            lines.append(f"{self.sweep} backward passes: {self.sweep_reason}")
        if self.layers:
            head = ("layer", "rows", "way", "MFLOP", "ordinary", "MiB", "reason")
            rows = [head, *(_cells(layer) for layer in self.layers)]
            widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
            left = (0, 2, 6)
            for row in rows:
                padded = enumerate(zip(row, widths, strict=True))
                cells = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in padded]
                lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    def millions(number: int | None) -> str:
        return "" if number is None else f"{number / 1e6:.1f}"

    rows = "" if layer.rows is None else str(layer.rows)
    memory = f"{layer.memory / 2**20:.2f}"
    return layer.name, rows, layer.way, millions(layer.flops), millions(layer.ordinary_flops), memory, layer.reason


@dataclass
class Chosen:
    """A plan, the layers that take the implicit way, and what steps have taught about it.

    Attributes:
        plan: for the user.
        columns: the places of the parameters that take the implicit way.
        wide: those of them whose products are computed in float64.
        not_batched: why batched passes failed in an earlier step; "" if they did not.
        proven: whether batched passes have succeeded.
    """

    plan: Plan
    columns: frozenset[int]
    wide: Wide = field(default_factory=Wide)
    not_batched: str = ""
    proven: bool = False


_cache: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first shared parameter
MOST_PLANS = 16  # kept for one model


def chosen_for(
    mode: str, names: Sequence[str], parameters: Sequence[Tensor], num_tasks: int, graph: Graph, budget: int | None
) -> tuple[Chosen, dict[int, Layer]]:
    """The plan for a graph, from the cache if one of the same structure had one, and the layers it takes.

    Args:
        mode: "implicit" or "auto".
        names: those of the parameters.
        parameters: the shared parameters.
        num_tasks: K.
        graph: what a walk of the losses found.
        budget: the most bytes that task gradients may take; None: those of the stored way.

    Raises:
        OverBudget: no plan keeps to the budget.
    """
    found = [layer_of(parameter, t, graph) for t, parameter in enumerate(parameters)]
    facts = tuple(x if isinstance(x, str) else (x.kind, x.rows, x.dtype, x.recomputed, len(x.uses)) for x in found)
    key = (mode, budget, num_tasks, tuple(names), tuple(p.shape for p in parameters), facts, graph.structure)
    if parameters[0] not in _cache:
        _cache[parameters[0]] = {}
    plans: dict[object, Chosen] = _cache[parameters[0]]
    chosen = plans.get(key)
    if chosen is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        chosen = plans[key] = _choose(mode, names, parameters, num_tasks, found, budget)
    layers = {x.column: x for x in found if isinstance(x, Layer) and x.column in chosen.columns}
    return chosen, layers


def without_walk(parameters: Sequence[Tensor], num_tasks: int) -> Chosen | None:
    """The plan to store the gradients of few parameters, for which the graph need not be known; None for more."""
    elements = num_tasks * sum(parameter.numel() for parameter in parameters)
    if elements >= SMALL:
        return None
    reason = f"the tasks' gradients have {elements:,} elements, and a plan is made from {SMALL:,} on"
    return Chosen(Plan("stored", reason), frozenset())


def flops(layer: Layer, num_tasks: int) -> tuple[int, int]:
    """The floating-point operations of the implicit and of the ordinary way, beyond the input gradients.

    The contraction of D_k with X X^T D_k is not counted, as the Gram matrix of stored rows is not: both are bound by
    memory. A layer whose input is packed counts as run forward once more, as in a checkpoint.
    """
    N, a, b = layer.rows, layer.constant_size, layer.delta_size
    if layer.kind == "embedding":
        return 0, 0
    gradient = 2 * N * a * b
    implicit = 2 * N * N * (a + num_tasks * b) + gradient
    return implicit + (gradient if layer.recomputed else 0), num_tasks * gradient


def memory(layer: Layer, parameter: Tensor, num_tasks: int) -> tuple[int, int]:
    """The bytes that the implicit and the ordinary way keep until the gradients are written."""
    kept = num_tasks * layer.rows * layer.delta_size
    if layer.recomputed:
        kept += layer.rows * layer.constant_size
    return kept * layer.dtype.itemsize, _stored(parameter, num_tasks)


def _stored(parameter: Tensor, num_tasks: int) -> int:
    return num_tasks * parameter.numel() * _grad.dtype_of(parameter).itemsize


def _choose(
    mode: str,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    num_tasks: int,
    found: Sequence[Layer | str],
    budget: int | None,
) -> Chosen:
    """The plan of least predicted cost that keeps to the budget."""
    rows: list[LayerPlan] = []
    for name, parameter, layer in zip(names, parameters, found, strict=True):
        if isinstance(layer, str):
            rows.append(LayerPlan(name, "ordinary", layer, None, None, None, _stored(parameter, num_tasks)))
            continue
        (work, ordinary), (kept, stored) = flops(layer, num_tasks), memory(layer, parameter, num_tasks)
        if layer.kind == "embedding":
            pays = layer.rows < parameter.shape[0]
            reason = f"{layer.rows} rows {'are fewer than' if pays else 'against'} {parameter.shape[0]} entries"
        else:
            pays = work <= ordinary
            reason = "fewer FLOPs" if pays else "the ordinary way takes fewer FLOPs"
        way = "implicit" if pays else "ordinary"
        rows.append(
            LayerPlan(name, way, reason, layer.rows, work if pays else ordinary, ordinary, kept if pays else stored)
        )
    rows = _within(rows, parameters, found, num_tasks, budget)
    implicit = frozenset(t for t, row in enumerate(rows) if row.way == "implicit")
    total = sum(x.flops or 0 for x in rows)
    ordinary = sum(x.ordinary_flops or 0 for x in rows)
    if not implicit:
        return Chosen(Plan("stored", "no shared parameter gains by the implicit way", layers=tuple(rows)), implicit)
    share = 1 - total / ordinary if ordinary else 0.0
    if mode == "auto" and share < WORTH and budget is None:
        reason = f"the implicit way would save {share:.0%} of the weight gradients' FLOPs"
        for t in implicit:
            stored = _stored(parameters[t], num_tasks)
            rows[t] = replace(rows[t], way="ordinary", flops=rows[t].ordinary_flops, memory=stored, reason=reason)
        return Chosen(Plan("stored", reason, layers=tuple(rows)), frozenset())
    saved = f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'} FLOPs for their gradients"
    reason = f"{len(implicit)} of {len(rows)} shared parameters, {saved}"
    return Chosen(Plan("implicit", reason, layers=tuple(rows)), implicit)


def _within(
    rows: list[LayerPlan],
    parameters: Sequence[Tensor],
    found: Sequence[Layer | str],
    num_tasks: int,
    budget: int | None,
) -> list[LayerPlan]:
    """Turns layers to the way of less memory until all together keep to the budget, those that save most first.

    Raises:
        OverBudget: they do not, even if each takes the way of less memory.
    """
    if budget is None:
        return rows
    rows = list(rows)
    saving: list[tuple[int, int, LayerPlan]] = []
    for t, (row, layer, parameter) in enumerate(zip(rows, found, parameters, strict=True)):
        if isinstance(layer, Layer):
            kept, stored = memory(layer, parameter, num_tasks)
            work, ordinary = flops(layer, num_tasks)
            to_implicit = row.way == "ordinary"
            other = replace(
                row,
                way="implicit" if to_implicit else "ordinary",
                reason="less memory, as memory_budget asks for",
                flops=work if to_implicit else ordinary,
                memory=kept if to_implicit else stored,
            )
            saving.append((row.memory - other.memory, t, other))
    total = sum(row.memory for row in rows)
    for saved, t, other in sorted(saving, key=lambda x: -x[0]):
        if total <= budget or saved <= 0:
            break
        rows[t], total = other, total - saved
    if total > budget:
        raise OverBudget(
            f"backward: memory_budget is {budget} bytes, expected at least {total}, which the gradients of {num_tasks} "
            "tasks take"
        )
    return rows
