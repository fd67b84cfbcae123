"""Weighted sums of the task gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._check import check_dtype, check_grads, check_groups, check_out, check_vector
from mtlfast.ops._fake import example, fake
from mtlfast.task_gradients import TaskGradients


def combine(
    grads: TaskGradients,
    weights: Tensor,
    out: Sequence[Tensor | None] | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    groups: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """Weighted sums of the tasks' gradients: scale * w J.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        weights: [K] for one sum or [R, K] for R sums, of any real dtype, on the gradients' device. With `groups` they
            are [G, K], one row for each group, and make one sum. A weight of 0 does not skip its task: inf and NaN in
            its gradients reach the result.
        out: T tensors to write, of shape [*shape] or [R, *shape], with the gradients' device and strides and one dtype
            for all. With weights [K] and in the gradients' dtype, they may be the gradients of one task, which are then
            overwritten. None: new tensors.
        accumulate: add to `out` instead of overwriting it.
        scale: a factor for all weights.
        dtype: the dtype of the result: float32, float64, bfloat16 or float16. None: that of `out`, or else that of the
            gradients.
        groups: T indices that assign each tensor to a group, where each group has its own weights. Without `groups`,
            weights [G, K] make G sums of all tensors.

    Returns:
        T tensors [*shape] or [R, *shape], which are `out` if it is given; None for a tensor that no task reaches.

    Raises:
        ValueError, TypeError: an argument does not fit, or there are more than 4077 tasks or 2**21 groups on a GPU.
            Nothing has been written then.

    Cost: one read of K * P and one write of R * P; with `accumulate` also one read of R * P. Weights, products and sums
    are float64 for every dtype, so that what is left of gradients that cancel is right too. Sums run over the tasks in
    ascending order and are rounded once, like torch rounds: to 16 bits by way of float32. Deterministic.

    Example:
        >>> import torch, mtlfast
        >>> grads = mtlfast.TaskGradients.from_matrix(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        >>> mtlfast.ops.combine(grads, torch.tensor([0.5, 1.0]))
        [tensor([ 3.5000, -3.0000])]
    """
    check_grads("combine", grads)
    check_vector("combine", "weights", weights, grads, matrix=True)
    if groups is not None:
        _check_groups(groups, weights, grads)
    if dtype is not None:
        check_dtype("combine", dtype)
    if out is not None:
        check_out("combine", out, grads, () if groups is not None else tuple(weights.shape[:-1]), dtype)
    elif accumulate:
        raise ValueError("combine: accumulate is True and out is None, expected the tensors to add to in out")
    return write(grads, weights, out, accumulate, scale, dtype, groups)


def _check_groups(groups: Sequence[int], weights: Tensor, grads: TaskGradients) -> None:
    if weights.dim() != 2:
        raise ValueError(
            f"combine: weights has shape {list(weights.shape)}, expected [G, {grads.num_tasks}] as groups are given"
        )
    check_groups("combine", groups, len(grads.shapes), len(weights), " as weights has rows")


def write(
    grads: TaskGradients,
    weights: Tensor,
    out: Sequence[Tensor | None] | None,
    accumulate: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    groups: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """Does what `combine` does, for arguments that are known to fit."""
    if not _native.serves(grads.device):
        return reference.combine(grads, weights, out, accumulate, scale, dtype, groups)
    with torch.no_grad():
        if out is None:
            fresh: list[Tensor] = grads.run(
                lambda C, table: C.combine(table, weights, scale, dtype, groups),
                lambda ops: ops.combine(grads.flat(), grads.num_tasks, weights, scale, dtype, groups),
            )
            return [None if shape is None else x for x, shape in zip(fresh, grads.shapes, strict=True)]
        targets = [weights.new_empty(0) if target is None else target for target in out]
        grads.run(
            lambda C, table: C.combine_(table, weights, targets, accumulate, scale, groups),
            lambda ops: ops.combine_(grads.flat(), grads.num_tasks, weights, targets, accumulate, scale, groups),
        )
    return [None if shape is None else x for x, shape in zip(out, grads.shapes, strict=True)]


@fake("combine")
def _fake_combine(
    rows: list[Tensor | None],
    num_tasks: int,
    coefficients: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    groups: Sequence[int] | None = None,
) -> list[Tensor]:
    dtype = example(rows).dtype if dtype is None else dtype
    num_tensors = len(rows) // num_tasks
    result = []
    for t in range(num_tensors):
        column = [row for row in rows[t::num_tensors] if row is not None]
        if not column:
            result.append(coefficients.new_empty((0,), dtype=dtype))
        elif coefficients.dim() == 1 or groups is not None:
            result.append(torch.empty_like(column[0], dtype=dtype))
        else:
            shape = (len(coefficients), *column[0].shape)
            strides = (column[0].numel(), *column[0].stride())
            result.append(column[0].new_empty_strided(shape, strides, dtype=dtype))
    return result


@fake("combine_")
def _fake_combine_(
    rows: list[Tensor | None],
    num_tasks: int,
    coefficients: Tensor,
    out: list[Tensor],
    accumulate: bool,
    scale: float,
    groups: Sequence[int] | None = None,
) -> None:
    return None
