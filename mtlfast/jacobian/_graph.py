"""Walks the autograd graph to find what losses depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlfast import _native

# Nodes behind which `torch.autograd.grad` does not find all parameters, and what to say of each.
HIDING = {
    "CheckpointFunctionBackward": (
        "the losses go through torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside from "
        "torch.autograd.grad; expected use_reentrant=False"
    ),
    "RegisterPostBackwardFunctionBackward": (
        "the losses go through a module under fully_shard (FSDP2), whose parameters are not where gradients arrive; "
        "expected modules that are not sharded"
    ),
}
# A node through which all outputs of a model go, so that each loss seems to reach all that any output depends on.
JOINING = "_DDPSinkBackward"
JOINED = (
    "the losses go through DistributedDataParallel with find_unused_parameters=True or static_graph=True, which joins "
    "the graphs of its outputs, so that all parameters look shared; expected shared="
)
# What to say of a backward pass that raises if the graph is retained.
DONATED = (
    "the losses go through a function of torch.compile whose backward pass frees its buffers, so that it cannot retain "
    "the graph; expected torch._functorch.config.donated_buffer = False before the model is compiled, or closures, "
    "with one forward pass a task"
)
AccumulateGrad: type[Any] = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
PythonNode: type[Any] = torch._C._FunctionBase
SEVERAL = -1  # the mark of what more than one loss reaches


@dataclass(frozen=True)
class Reached:
    """What a walk found. It holds leaves and types, but no node of the graph.

    Attributes:
        leaves: the leaf tensors that a loss depends on and that require grad, each once, in the order of discovery.
        by_several: for each leaf, whether more than one loss reaches it.
        met_by: for each tensor of `stop_at`, the number of the first loss that reaches it; None if no loss does.
        functions: the types of the nodes that Python code defined, and for each the number of the first loss that
            reaches it.
        num_losses: the number of losses.
    """

    leaves: list[Tensor]
    by_several: list[bool]
    met_by: list[int | None]
    functions: dict[type, int]
    num_losses: int

    @property
    def several(self) -> list[Tensor]:
        """The leaves that more than one loss reaches."""
        return [leaf for leaf, several in zip(self.leaves, self.by_several, strict=True) if several]

    @property
    def met(self) -> list[bool]:
        """For each tensor of `stop_at`, whether a loss reaches it."""
        return [loss is not None for loss in self.met_by]

    @property
    def hiding(self) -> str | None:
        """Why some parameters cannot be found, as part of an error; None if all were found."""
        names = (function.__name__ for function in self.functions)
        return next((HIDING[name] for name in names if name in HIDING), None)

    def check_told_apart(self, caller: str) -> None:
        """Raises if the walk cannot tell which loss reaches which parameters.

        Args:
            caller: the name that the error begins with.
        """
        if any(function.__name__ == JOINING for function in self.functions):
            raise ValueError(f"{caller}: {JOINED}")

    def once(self, retain_graph: bool = False) -> str | None:
        """Says why one backward pass for each loss, from the first to the last, would fail, as part of an error.

        All passes but the last retain the graph, which a compiled function that donates its buffers to its backward
        pass cannot do. Whether it donates them is decided when its backward pass is compiled. With static shapes that
        is when it first runs, and it does not donate if that run retains the graph. torch has no public way to ask: the
        answer comes from private attributes, as torch 2.13 has them, and is None where they are missing.

        Args:
            retain_graph: whether the last pass retains the graph as well.

        Returns:
            None if no pass would fail.
        """
        number = self.num_losses if retain_graph else self.num_losses - 1
        retained = (function for function, first in self.functions.items() if first < number)
        return DONATED if any(map(_donates, retained)) else None

    def check(self, caller: str, retain_graph: bool) -> None:
        """Raises if autograd cannot make the gradients of a step with one backward pass for each loss.

        Args:
            caller: the name that the error begins with.
            retain_graph: whether the last pass retains the graph as well.
        """
        if (why := self.hiding or self.once(retain_graph)) is not None:
            raise ValueError(f"{caller}: {why}")


def reached_by(losses: Sequence[Tensor], stop_at: Sequence[Tensor] = ()) -> Reached:
    """Walks the graph of the losses.

    A parameter that was frozen after the forward pass is still in the graph, but is not returned. The same loss given
    twice counts as two.

    Args:
        losses: tensors that require grad.
        stop_at: tensors, leaves or not, behind which the walk does not look. A tensor is told from the other outputs
            of the function that made it.

    Cost: at most two visits of each node of the graph, on the host, whatever the number of losses. A graph of 10,000
    nodes takes 8 to 10 ms, or 32 to 36 ms without the extension (docs/performance.md).
    """
    return _reached(losses, stop_at, False)


def dependent(features: Sequence[Tensor]) -> tuple[int, int] | None:
    """Looks for a tensor that is computed from another one of them, or that is the same one.

    Args:
        features: tensors that require grad, leaves or not.

    Returns:
        The positions of such a pair, the first computed from the second; None if there is none. If a tensor occurs
        twice, the second occurrence is the first of the pair.

    Cost: at most two visits of each node of the graph behind the features, on the host.
    """
    known: dict[Any, int] = {}
    for position, feature in enumerate(features):
        first = known.setdefault(_key(*_edge(feature)), position)
        if first != position:
            return position, first
    for position, by in enumerate(_reached(features, features, True).met_by):
        if by is not None:
            return by, position
    return None


def _reached(tensors: Sequence[Tensor], stop_at: Sequence[Tensor], behind: bool) -> Reached:
    native = _native.module()
    walk = _walk if native is None else native.reached_by
    leaves, by_several, met_by, functions = walk(list(tensors), list(stop_at), behind)
    return Reached(leaves, by_several, met_by, functions, len(tensors))


def _walk(
    tensors: Sequence[Tensor], stop_at: Sequence[Tensor], behind: bool
) -> tuple[list[Tensor], list[bool], list[int | None], dict[type, int]]:
    """The walk without the extension, which gives the same results in the same order: the fields of `Reached`.

    Each tensor is walked in turn. A place that a second tensor reaches is entered once more, so that all behind it is
    marked as well; a third tensor finds it marked and does not enter it.

    The walk does not recurse, but torch frees the nodes that Python code has looked at by recursion: a process crashes
    when it frees a chain of 50,000 of them. The native walk does not look at them from Python.

    Args:
        behind: start behind each tensor instead of at it.
    """
    leaves: list[Tensor] = []
    functions: dict[type, int] = {}
    marks: dict[Any, int] = {}  # the number of the one tensor that reached a place, or SEVERAL
    stops: dict[Any, int | None] = {_key(*_edge(tensor)): None for tensor in stop_at if tensor.requires_grad}
    for number, tensor in enumerate(tensors):
        waiting = _next_edges(tensor.grad_fn) if behind else [_edge(tensor)]
        while waiting:
            place, output = waiting.pop()
            if type(place) is AccumulateGrad:
                place = place.variable
            key = _key(place, output)
            if key in stops:
                stops[key] = number if stops[key] is None else stops[key]
                continue
            mark = marks.get(key[0])
            if mark in (number, SEVERAL):
                continue
            marks[key[0]] = number if mark is None else SEVERAL
            if not isinstance(place, Tensor):
                if isinstance(place, PythonNode):
                    functions.setdefault(type(place), number)
                waiting += _next_edges(place)
            elif mark is None and place.requires_grad:
                leaves.append(place)
    by_several = [marks[id(leaf)] == SEVERAL for leaf in leaves]
    return leaves, by_several, [stops.get(_key(*_edge(tensor))) for tensor in stop_at], functions


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Where the tensor's gradient arrives: the node that made it and which of the node's outputs it is, or the leaf."""
    return (tensor, 0) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _next_edges(node: Any) -> list[tuple[Any, int]]:
    return [] if node is None else [edge for edge in node.next_functions if edge[0] is not None]


def _key(place: Any, output: int) -> tuple[Any, int]:
    """What recognises an edge. A leaf has its id, because several nodes may accumulate its gradient.

    A node is its own key, because it is recognised only while its Python object lives.
    """
    return id(place) if isinstance(place, Tensor) else place, output


def _donates(function: type) -> bool:
    """Whether a node of this type is the backward pass of a compiled function that cannot retain the graph.

    It asks what was compiled, even if `donated_buffer` is False now: torch does not check then, and a second pass would
    read what the first has overwritten. Where nothing was donated because the setting was off, torch raises as soon as
    it is on.
    """
    compiled = getattr(function, "_forward_cls", None)
    metadata, backward = getattr(compiled, "metadata", None), getattr(compiled, "compiled_bw", None)
    donated = getattr(metadata, "bw_donated_idxs", [])
    return backward is not None and donated != [] and (bool(donated) or bool(torch._functorch.config.donated_buffer))
