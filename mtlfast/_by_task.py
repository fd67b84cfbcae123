"""Reads and writes the entries of some tasks in a tensor that has an entry for each task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# If tasks are absent, entries are taken one by one. On a GPU that is a launch for each, but an index tensor would be a
# copy from the host, which waits.


def take(values: Tensor, tasks: Sequence[int]) -> Tensor:
    """The tasks' entries [..., K] of `values` [..., n]. It returns `values` itself for all n tasks in order."""
    if _everyone(values, tasks):
        return values
    return torch.stack([values[..., task] for task in tasks], dim=-1)


def put(values: Tensor, tasks: Sequence[int], new: Tensor) -> None:
    """Writes `new` [..., K] to the tasks' entries of `values` [..., n]."""
    if _everyone(values, tasks):
        values.copy_(new)
        return
    for task, value in zip(tasks, new.unbind(-1), strict=True):
        values[..., task] = value


def _everyone(values: Tensor, tasks: Sequence[int]) -> bool:
    return tuple(tasks) == tuple(range(values.shape[-1]))
