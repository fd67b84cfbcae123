"""Walks the autograd graph to find the leaves that losses depend on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

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
COMPILED = "CompiledFunctionBackward"  # the node of a function that torch.compile compiled
ONCE = (
    "the losses go through a torch.compile'd function whose backward pass was compiled to overwrite what it reads "
    "(donated buffers), and this step needs it more than once; expected torch._functorch.config.donated_buffer = False "
    "before it is compiled, or closures, each with a forward pass of its own"
)
AccumulateGrad: type[Any] = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
Edge = tuple[Any, int]  # a node, and the number of one of its outputs
SEVERAL = -1  # in place of one loss


class Reached(NamedTuple):
    """What a walk found.

    Attributes:
        leaves: the leaf tensors that a loss depends on and that require grad, each once, in the order of discovery.
        by_several: for each leaf, whether more than one of the losses depends on it.
        met: for each tensor of `stop_at`, whether a loss depends on it.
        functions: the names of the nodes on the way that are defined in Python, or of all nodes.
        losses: where the walk began.
    """

    leaves: list[Tensor]
    by_several: list[bool]
    met: list[bool]
    functions: Collection[str]
    losses: Sequence[Tensor]

    @property
    def hiding(self) -> str | None:
        """Why `torch.autograd.grad` does not find all parameters, as part of an error; None if it does."""
        return next((why for name, why in HIDING.items() if name in self.functions), None)

    @property
    def once(self) -> str | None:
        """Why the graph admits only one backward pass, as part of an error; None if it admits several."""
        if COMPILED not in self.functions or not torch._functorch.config.donated_buffer:
            return None
        for node in _nodes_behind(self.losses):
            function = getattr(node, "_forward_cls", None) if type(node).__name__ == COMPILED else None
            donated = getattr(getattr(function, "metadata", None), "bw_donated_idxs", None)
            # A backward pass that is not compiled yet is compiled for the needs of its first call.
            if donated and getattr(function, "compiled_bw", None) is not None:
                return ONCE
        return None

    def check(self, caller: str, several_passes: bool) -> None:
        """Raises if autograd cannot make the gradients that a step needs.

        Args:
            caller: the name that the error begins with.
            several_passes: whether the step runs more than one backward pass through the graph, or keeps it.
        """
        if (why := self.hiding or (self.once if several_passes else None)) is not None:
            raise ValueError(f"{caller}: {why}")


def reached_by(losses: Sequence[Tensor], stop_at: Sequence[Tensor] = (), behind: bool = False) -> Reached:
    """Walks the graph of the losses.

    A parameter that was frozen after the forward pass is still in the graph, but is not returned.

    Args:
        losses: tensors that require grad.
        stop_at: tensors through which the walk does not go.
        behind: start behind each of the losses instead of at it, so that one that is also in `stop_at` is met only if
            another one depends on it.

    Cost: at most two visits of each node of the graph, on the host, for any number of losses.
    """
    native = _native.module()
    walk = _walk if native is None else native.reached_by
    leaves, by_several, met, functions = walk(losses, stop_at, behind)
    return Reached(leaves, by_several, met, functions, losses)


def _walk(
    losses: Sequence[Tensor], stop_at: Sequence[Tensor] = (), behind: bool = False
) -> tuple[list[Tensor], list[bool], list[bool], set[str]]:
    """The first four attributes of `Reached`. The native version names only nodes defined in Python.

    A node is visited for the first loss that reaches it, and once more for the second: from then on everything behind
    it is known to be reached by several.
    """
    leaves: dict[int, Tensor] = {}
    owners: dict[Any, int] = {}  # nodes are recognised only while they are kept, as they are here and in `stops`
    functions: set[str] = set()
    met = [False] * len(stop_at)
    stops: dict[Edge, list[int]] = {}
    for i, tensor in enumerate(stop_at):
        stops.setdefault(_edge(tensor), []).append(i)

    for k, loss in enumerate(losses):
        start = _edge(loss)
        inside = behind and type(start[0]) is not AccumulateGrad
        waiting: list[Edge] = list(start[0].next_functions) if inside else [start]
        while waiting:
            node, _ = edge = waiting.pop()
            if node is None:
                continue
            if edge in stops and not (behind and edge == start):
                for i in stops[edge]:
                    met[i] = True
                continue
            owner = owners.get(node)
            if owner in (k, SEVERAL):
                continue
            owners[node] = k if owner is None else SEVERAL
            if type(node) is AccumulateGrad:
                if node.variable.requires_grad:
                    leaves[id(node.variable)] = node.variable
            else:
                functions.add(type(node).__name__)
                waiting.extend(node.next_functions)
    several = {id(node.variable) for node, k in owners.items() if type(node) is AccumulateGrad and k == SEVERAL}
    return list(leaves.values()), [key in several for key in leaves], met, functions


def _edge(tensor: Tensor) -> Edge:
    """Where the gradient of the tensor arrives: a node, and which of its outputs the tensor is."""
    node, output, *_ = torch.autograd.graph.get_gradient_edge(tensor)
    return node, output


def _nodes_behind(losses: Sequence[Tensor]) -> Iterator[Any]:
    """All nodes of the graph, each once."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn for loss in losses]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(next_node for next_node, _ in node.next_functions)
            yield node
