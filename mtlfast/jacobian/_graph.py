"""Which leaves a loss reaches: a walk of the autograd graph."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def reached_leaves(losses: Sequence[Tensor]) -> list[Tensor]:
    """The leaf tensors that any of the losses depends on and that want a gradient, each once, in order of discovery.

    Args:
        losses: tensors that require grad.

    Cost: a visit of each node of the graph, on the host.
    """
    leaves: dict[int, Tensor] = {}
    seen: set[Any] = set()  # the nodes themselves: a node's Python object must live on to be recognised again
    waiting: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    for loss in losses:
        if loss.grad_fn is None:
            leaves[id(loss)] = loss
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # AccumulateGrad's
        if leaf is not None:
            leaves[id(leaf)] = leaf
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return list(leaves.values())
