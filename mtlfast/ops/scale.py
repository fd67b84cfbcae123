"""Scaling of each task's gradients in place."""

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._check import check_grads, check_vector
from mtlfast.ops._fake import fake
from mtlfast.task_gradients import TaskGradients


def scale_(grads: TaskGradients, factors: Tensor) -> TaskGradients:
    """Multiplies each task's gradients by a factor, in place.

    Args:
        grads: K tasks x T tensors, P elements for each task. Autograd may return one tensor twice. Entries that share
            memory are copied first, so read the result in `grads.rows`.
        factors: [K], of any real dtype, on the gradients' device. A factor of 0 turns inf and NaN into NaN.

    Returns:
        `grads`.

    Raises:
        ValueError, TypeError: an argument does not fit. Nothing has been written then.

    Cost: one read and one write of K * P. Deterministic.
    """
    check_grads("scale_", grads)
    check_vector("scale_", "factors", factors, grads)
    grads.separate()
    if not _native.serves(grads.device):
        reference.scale_(grads, factors)
        return grads

    def on_rows(ops: object) -> None:
        owners = [(k, entry) for k, row in enumerate(grads.rows) for entry in row if entry is not None]
        torch.ops.mtlfast.scale_([entry for _, entry in owners], [k for k, _ in owners], factors)

    factors = factors.clone()  # which may be one of the gradients
    with torch.no_grad():
        grads.run(lambda C, table: C.scale_(table, factors), on_rows)
    return grads


@fake("scale_")
def _fake_scale_(tensors: list[Tensor], tasks: list[int], factors: Tensor) -> None:
    return None
