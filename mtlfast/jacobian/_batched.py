"""One backward pass through the trunk for all tasks, below the tensor at which their losses meet."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlfast.jacobian._graph import AccumulateGrad, PythonNode
from mtlfast.jacobian._plan import Chosen
from mtlfast.jacobian._sequential import Pass, Targets
from mtlfast.jacobian._uses import Graph

# Functions whose backward formula torch runs once a task under vmap, or as a slower one, where that costs much. It runs
# most formulas without matrix products once a task, such as those of activations and normalisations.
SLOW = ("ConvolutionBackward0", "CudnnRnnBackward0", "MkldnnRnnLayerBackward0", "MiopenRnnBackward0")
SLOW_ON_GPU = "ScaledDotProduct"


@dataclass(frozen=True)
class Meeting:
    """Where the gradients of all losses come together.

    Attributes:
        edge: the one place through which all gradients of the layers go.
        below: the nodes behind it.
    """

    edge: GradientEdge
    below: frozenset[Any]


class NotBatched(Exception):
    """A batched pass failed, and why."""


def meeting_of(losses: Sequence[Tensor], graph: Graph, captured: frozenset[Any]) -> Meeting | None:
    """The first place through which the gradients of all losses go on their way to the layers; None if there is none.

    Args:
        losses: the losses.
        graph: what a walk of them found.
        captured: the nodes at which the layers' gradients are wanted.
    """
    leads = _leading_to(graph.nodes, captured)
    arriving = dict.fromkeys(leads, 0)
    for node in leads:
        for behind, _ in node.next_functions:
            if behind in leads:
                arriving[behind] += 1
    # The edges that lead from what was looked at to what was not, and how often. A node is looked at once all of its
    # edges have come, the last made first, as autograd does.
    edges: dict[tuple[Any, int], int] = {}
    come = dict.fromkeys(leads, 0)
    ready: list[tuple[int, int, Any]] = []

    def arrive(node: Any, output: int) -> None:
        edges[node, output] = edges.get((node, output), 0) + 1

    roots: list[tuple[Any, int]] = [(loss.grad_fn, loss.output_nr) for loss in losses if loss.grad_fn in leads]
    for node, output in roots:
        arrive(node, output)
    for number, node in enumerate({node: None for node, _ in roots}):
        if arriving[node] == 0:
            heapq.heappush(ready, (-node._sequence_nr(), number, node))
    number = len(roots)
    while ready:
        if len(edges) == 1:
            ((node, output),) = edges
            below = frozenset(_behind(node))
            return (
                None if _entered(losses, graph, below, (node, output)) else Meeting(GradientEdge(node, output), below)
            )
        _, _, node = heapq.heappop(ready)
        for edge in [edge for edge in edges if edge[0] is node]:
            del edges[edge]
        for behind, output in node.next_functions:
            if behind in leads:
                arrive(behind, output)
                come[behind] += 1
                if come[behind] == arriving[behind]:
                    number += 1
                    heapq.heappush(ready, (-behind._sequence_nr(), number, behind))
    return None


def _leading_to(nodes: Sequence[Any], captured: frozenset[Any]) -> set[Any]:
    """The nodes from which one of `captured` can be reached, which are these themselves as well."""
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for behind, _ in node.next_functions:
            if behind is not None:
                users.setdefault(behind, []).append(node)
    leads: set[Any] = set()
    waiting = list(captured)
    while waiting:
        node = waiting.pop()
        if node not in leads:
            leads.add(node)
            waiting += users.get(node, ())
    return leads


def _behind(node: Any) -> set[Any]:
    """The node and all that its gradient goes on to, leaves included."""
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [behind for behind, _ in node.next_functions if behind is not None]
    return seen


def _entered(losses: Sequence[Tensor], graph: Graph, below: frozenset[Any], meeting: tuple[Any, int]) -> bool:
    """Whether a gradient comes into `below` by another edge than the meeting. Leaves may get several."""
    edges = [(loss.grad_fn, loss.output_nr) for loss in losses]
    for node in graph.nodes:
        if node not in below:
            edges += node.next_functions
    return any(edge[0] in below and edge != meeting and type(edge[0]) is not AccumulateGrad for edge in edges)


def why_not(meeting: Meeting | None, graph: Graph, device: torch.device) -> str | None:
    """Why the passes cannot be batched, or should not be; None if they should."""
    if meeting is None:
        return "the losses do not meet at one tensor above the implicit layers"
    if graph.hooked:
        return "the model has hooks, which would see the gradients of all tasks at once"
    for node in meeting.below:
        name = type(node).__name__
        if type(node) is AccumulateGrad and node.variable._backward_hooks:
            return "a parameter or an input has a tensor hook, which would see the gradients of all tasks at once"
        if isinstance(node, PythonNode):
            return f"{name} is code in Python, which would see the gradients of all tasks at once"
        if name in SLOW or (device.type == "cuda" and name.startswith(SLOW_ON_GPU)):
            return f"torch runs {name} more slowly for all tasks at once"
    return None


def where(targets: Targets, meeting: Meeting, graph: Graph) -> list[bool] | None:
    """For each target whether it lies below the meeting; None if a leaf is reached both below and beside it."""
    below: list[bool] = []
    for target in targets:
        if isinstance(target, GradientEdge):
            below.append(target.node in meeting.below)
            continue
        sides = {node in meeting.below for node, _ in graph.users.get(id(target), ())}
        if len(sides) > 1:
            return None
        below.append(True in sides)
    return below


def batched(
    losses: Sequence[Tensor],
    weights: Tensor | None,
    wanted: Sequence[int],
    targets: Targets,
    retain_graph: bool,
    meeting: Meeting,
    below: Sequence[bool],
    chosen: Chosen,
) -> Iterator[Pass]:
    """Runs each task's pass down to the meeting, and one pass for all tasks below it.

    Args:
        losses: as in `sequential`, and so are `weights`, `wanted`, `targets` and `retain_graph`.
        meeting: where the losses meet.
        below: for each target whether it lies below the meeting.
        chosen: where it is noted that such passes succeed. The first time the graph is kept.

    Raises:
        NotBatched: torch cannot run the passes of all tasks at once. The graph is kept then.
    """
    above = [target for target, is_below in zip(targets, below, strict=True) if not is_below]
    inside = [target for target, is_below in zip(targets, below, strict=True) if is_below]
    of_heads: dict[int, Sequence[Tensor | None]] = {}
    for k in wanted:
        weight = None if weights is None else weights[k].to(losses[k].dtype)
        of_heads[k] = torch.autograd.grad(
            losses[k], [meeting.edge, *above], weight, retain_graph=True, allow_unused=True
        )
    arrived = [k for k in wanted if of_heads[k][0] is not None]
    stacked: Sequence[Tensor | None] = [None] * len(inside)
    if arrived:
        gradients = torch.stack([x for k in arrived if (x := of_heads[k][0]) is not None])
        try:
            stacked = torch.autograd.grad(
                [meeting.edge],
                inside,
                [gradients],
                retain_graph=retain_graph or not chosen.proven,
                is_grads_batched=True,
                allow_unused=True,
            )
        except RuntimeError as error:
            if chosen.proven:
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise NotBatched(f"torch cannot run it for all tasks at once: {said}") from error
        del gradients
        chosen.proven = True
    for k in wanted:
        head, trunk = iter(of_heads.pop(k)[1:]), iter(stacked)
        place = arrived.index(k) if k in arrived else None
        row: list[Tensor | None] = []
        for is_below in below:
            if not is_below:
                row.append(next(head))
                continue
            of_all = next(trunk)
            row.append(None if of_all is None or place is None else of_all[place])
        yield k, row
