"""Entries of some tasks in a tensor that has one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# One by one where tasks are absent: on a GPU each is a launch, but an index tensor is a copy that waits.


def take(values: Tensor, tasks: Sequence[int]) -> Tensor:
    """The tasks' entries [..., K] of values [..., n]; `values` itself for all n in order."""
    if _everyone(values, tasks):
        return values
    return torch.stack([values[..., task] for task in tasks], dim=-1)


def put(values: Tensor, tasks: Sequence[int], new: Tensor) -> None:
    if _everyone(values, tasks):
        values.copy_(new)
        return
    for task, value in zip(tasks, new.unbind(-1), strict=True):
        values[..., task] = value


def _everyone(values: Tensor, tasks: Sequence[int]) -> bool:
    return tuple(tasks) == tuple(range(values.shape[-1]))
