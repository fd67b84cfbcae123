"""What `accelerate()` runs in place of TorchJD's ExcessMTL. The state stays in the buffers of TorchJD's weighting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.compat._torchjd_faces import is_hooked
from mtlfast.task_gradients import TaskGradients

DTYPES = (torch.float32, torch.float64)  # in half precision TorchJD rounds in between, which the kernels do not
EPS = 1e-7  # TorchJD's, below the root and beside the baseline


def serves(matrix: Tensor) -> bool:
    """Whether `weights` gives TorchJD's results for a Jacobian of this dtype."""
    return matrix.dtype in DTYPES


def is_as_made(aggregator: Any) -> bool:
    """Whether it is TorchJD's ExcessMTL, of which nothing was replaced, and no hook waits for the Jacobian matrix."""
    import torchjd.aggregation

    if type(aggregator) is not getattr(torchjd.aggregation, "ExcessMTL", None):
        return False
    weighting = aggregator.weighting
    untouched = vars(aggregator).keys().isdisjoint(("forward", "_combine")) and "forward" not in vars(weighting)
    return untouched and type(weighting) is torchjd.aggregation.ExcessMTLWeighting and not is_hooked(weighting)


def weights(weighting: Any, grads: TaskGradients) -> Tensor:
    """One step of TorchJD's weighting, which moves its buffers: the weights [m] in the Jacobian's dtype.

    Its sums of squares [m, n] are read and written in place, in columns that lie as those of one Jacobian matrix.
    """
    m, n = grads.num_tasks, grads.numel()
    like = torch.empty((), dtype=grads.dtype, device=grads.device).expand(m, n)
    weighting._ensure_state(like)
    sums = _columns(weighting._sq_grad_sum, grads)
    risks = ops.excess_risks(grads, sums, EPS).to(grads.dtype)
    ones = torch.ones(m, dtype=torch.float64, device=grads.device)
    ops.advance_(grads, sums, ones, ones, square=True)
    warm = weighting._n_steps >= weighting.n_warmup_steps
    weighting._n_steps += 1
    before: Tensor = weighting._weights
    if not warm:
        weighting._warmup_w_sum.add_(risks)
        return before
    relative = risks
    if weighting._initial_w is None and weighting.n_warmup_steps == 0:
        weighting._initial_w = risks
    else:
        if weighting._initial_w is None:
            weighting._initial_w = weighting._warmup_w_sum / weighting.n_warmup_steps
        relative = risks / (weighting._initial_w + EPS)
    weighting._weights = (before.log() + weighting.robust_step_size * relative).softmax(dim=0)
    moved: Tensor = weighting._weights
    return moved


def _columns(matrix: Tensor, grads: TaskGradients) -> TaskGradients:
    """The rows of a contiguous matrix [m, n], each in T views with the gradients' shapes."""
    rows = []
    for row in matrix.unbind(0):
        begin, views = 0, []
        for shape in grads.shapes:
            assert shape is not None
            views.append(row[begin : begin + shape.numel()].view(shape))
            begin += shape.numel()
        rows.append(views)
    return TaskGradients.from_rows(rows)
