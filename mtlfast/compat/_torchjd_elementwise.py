"""What `accelerate()` runs in place of TorchJD's aggregators that look at each element by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.ops.trimmed_mean import MOST_SORTED
from mtlfast.task_gradients import TaskGradients

# A function of TorchJD's aggregator and the task gradients. It returns one tensor for each of theirs, or None if
# TorchJD must compute the direction itself.
DirectionOf = Callable[[Any, TaskGradients], list[Tensor | None] | None]


def grad_drop(aggregator: Any, grads: TaskGradients) -> list[Tensor | None] | None:
    """As TorchJD, it draws one torch.rand, decides and adds in the gradients' dtype, and rounds every operation.

    torch adds the last columns of a matrix, and the last ones of each thread, in another order than the others. There
    the purities, and so the decisions, may differ where purity and random number agree to the last bits.

    TorchJD itself serves 16-bit gradients, a function of the purity, and a leak of another dtype or device.
    """
    from torchjd.aggregation._graddrop import _identity

    leak = aggregator.leak
    if grads.dtype not in (torch.float32, torch.float64) or aggregator.f is not _identity or grads.numel() == 0:
        return None
    if leak is not None and (leak.dtype, leak.device, leak.shape) != (grads.dtype, grads.device, (grads.num_tasks,)):
        return None
    drawn = torch.rand(grads.numel(), dtype=grads.dtype, device=grads.device)
    with torch.no_grad():
        return ops.grad_drop(grads, uniform=drawn, leak=leak, round_each=True)


def trimmed_mean(aggregator: Any, grads: TaskGradients) -> list[Tensor | None] | None:
    """Adds the same gradients as TorchJD, in double.

    TorchJD itself refuses too few gradients, sorts what is not finite, and serves more than 64 tasks.
    """
    if not 0 <= 2 * aggregator.trim_number < grads.num_tasks <= MOST_SORTED:
        return None
    with torch.no_grad():
        means = ops.trimmed_mean(grads, aggregator.trim_number)
    finite = torch.stack([x.isfinite().all() for x in means if x is not None])
    return means if bool(finite.all()) else None  # host: NaN and infinity are TorchJD's


# By the aggregator's name in torchjd.aggregation.
DIRECTION_OF: dict[str, DirectionOf] = {"GradDrop": grad_drop, "TrimmedMean": trimmed_mean}
