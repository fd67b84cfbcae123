"""Walks the autograd graph to find the leaves that losses depend on."""

from __future__ import annotations

from collections.abc import Sequence
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
AccumulateGrad: type[Any] = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


class Reached(NamedTuple):
    """What a walk found.

    Attributes:
        leaves: the leaf tensors that a loss depends on and that require grad, each once, in the order of discovery.
        hiding: why some parameters cannot be found, as part of an error; None if all were found.
    """

    leaves: list[Tensor]
    hiding: str | None


def reached_by(losses: Sequence[Tensor]) -> Reached:
    """Walks the graph of the losses.

    A parameter that was frozen after the forward pass is still in the graph, but is not returned.

    Args:
        losses: tensors that require grad.

    Cost: one visit of each node of the graph, on the host.
    """
    native = _native.module()
    leaves, functions = _walk(losses) if native is None else native.reached_by(losses)
    hiding = [HIDING[name] for name in functions if name in HIDING]
    return Reached(leaves, hiding[0] if hiding else None)


def _walk(losses: Sequence[Tensor]) -> tuple[list[Tensor], set[str]]:
    """The leaves, and the names of the nodes on the way. The native version names only nodes defined in Python."""
    leaves = {id(loss): loss for loss in losses if loss.grad_fn is None}
    functions: set[str] = set()
    seen: set[Any] = set()  # the nodes themselves, because a node is recognised only while its Python object lives
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
