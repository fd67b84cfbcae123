"""What losses depend on: a walk of the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlfast import _native

# What `torch.autograd.grad` cannot go through, by the name of its node: it hides parameters, or moves them.
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
AccumulateGrad: type[Any] = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


class Reached(NamedTuple):
    """What a walk found.

    Attributes:
        leaves: the leaf tensors that any loss depends on and that want a gradient, each once, in order of discovery.
        hiding: why some parameters cannot be found, in one sentence; None: all are.
    """

    leaves: list[Tensor]
    hiding: str | None


def reached_by(losses: Sequence[Tensor]) -> Reached:
    """Walks the graph of the losses.

    A parameter that was frozen after the forward pass is still in the graph and wants no gradient any more.

    Args:
        losses: tensors that require grad.

    Cost: a visit of each node of the graph, on the host.
    """
    native = _native.module()
    leaves, functions = _walk(losses) if native is None else native.reached_by(losses)
    hiding = [HIDING[name] for name in functions if name in HIDING]
    return Reached(leaves, hiding[0] if hiding else None)


def _walk(losses: Sequence[Tensor]) -> tuple[list[Tensor], set[str]]:
    """The leaves, and the names of the functions on the way to them; the native twin names those of Python alone."""
    leaves = {id(loss): loss for loss in losses if loss.grad_fn is None}
    functions: set[str] = set()
    seen: set[Any] = set()  # the nodes themselves: a node's Python object must live on to be recognised again
    waiting: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node) is AccumulateGrad:
            leaf = node.variable
            if leaf.requires_grad:
                leaves[id(leaf)] = leaf
        else:
            functions.add(type(node).__name__)
            waiting.extend([next_node for next_node, _ in node.next_functions])
    return list(leaves.values()), functions
