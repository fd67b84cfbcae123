"""Backward passes for one task after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlfast.jacobian._overwriting import Overwriting

Targets = Sequence[Any]  # leaf tensors and `GradientEdge`s: where gradients are wanted
Pass = tuple[int, Sequence[Tensor | None]]  # a task, and its gradients of all targets


def sequential(
    losses: Sequence[Tensor],
    weights: Tensor | None,
    wanted: Sequence[int],
    targets: Targets,
    retain_graph: bool,
    overwriting: Overwriting,
) -> Iterator[Pass]:
    """Runs one backward pass for each task. The last one frees the graph.

    Args:
        losses: the K losses.
        weights: [K], what each loss is multiplied by. None: 1 each.
        wanted: the tasks that have a pass.
        targets: where gradients are wanted.
        retain_graph: keep the graph.
        overwriting: looks at compiled functions between the passes.
    """
    for k in wanted:
        loss = losses[k]
        weight = None if weights is None else weights[k].to(loss.dtype)
        keep = retain_graph or k != wanted[-1]
        gradients = torch.autograd.grad(loss, targets, weight, retain_graph=keep, allow_unused=True)
        overwriting.check("backward", last=k == wanted[-1])
        yield k, gradients
        del gradients  # before the next pass makes others
