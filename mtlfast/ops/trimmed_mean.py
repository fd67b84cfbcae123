"""The mean of the tasks' gradients without the most extreme ones, element by element."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast._numbers import plain
from mtlfast.ops._check import check_grads, check_out
from mtlfast.ops._fake import fake, like_gradients
from mtlfast.task_gradients import TaskGradients

MOST_SORTED = 64  # tasks that the kernels sort


def trimmed_mean(
    grads: TaskGradients, trim_number: int, out: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """The mean of each element's K gradients without the least and the largest ones.

    A gradient of None is one of zeros. With trim_number = (K - 1) // 2 the result is the median, which is the mean of
    the two middle gradients if K is even.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        trim_number: how many of the least and how many of the largest gradients of each element are left out. At least
            one must be left.
        out: T tensors to write, with the gradients' shapes, strides, device and dtype. They may be the gradients of one
            task, which are then overwritten. None: new tensors.

    Returns:
        T tensors, which are `out` if it is given; None for a tensor that no task reaches. An element for which a
        gradient is inf or NaN is NaN, also if that gradient would be left out.

    Raises:
        ValueError, TypeError: an argument does not fit. Nothing has been written then.

    Cost: one read of K * P and one write of P for up to 64 tasks; with more, plain PyTorch sorts them. The gradients
    that are kept are added in ascending order in float64, divided, and rounded once. So the order of the tasks does not
    matter. Deterministic.

    Example:
        >>> import torch, mtlfast
        >>> grads = mtlfast.TaskGradients.from_matrix(torch.tensor([[1.0, 5.0], [2.0, -9.0], [90.0, 6.0]]))
        >>> mtlfast.ops.trimmed_mean(grads, 1)
        [tensor([2., 5.])]
    """
    check_grads("trimmed_mean", grads)
    trim_number = plain(trim_number)
    if not isinstance(trim_number, int) or isinstance(trim_number, bool) or trim_number < 0:
        raise ValueError(f"trimmed_mean: trim_number is {trim_number!r}, expected an integer of at least 0")
    if 2 * trim_number >= grads.num_tasks:
        raise ValueError(
            f"trimmed_mean: trim_number is {trim_number}, expected less than half of the {grads.num_tasks} tasks"
        )
    if out is not None:
        check_out("trimmed_mean", out, grads, (), grads.dtype)
    if not _native.serves(grads.device) or grads.num_tasks > MOST_SORTED:
        return reference.trimmed_mean(grads, trim_number, out)
    with torch.no_grad():
        if out is None:
            fresh: list[Tensor] = grads.run(
                lambda C, table: C.trimmed_mean(table, trim_number),
                lambda ops: ops.trimmed_mean(grads.flat(), grads.num_tasks, trim_number),
            )
            return [None if shape is None else x for x, shape in zip(fresh, grads.shapes, strict=True)]
        targets = [torch.empty(0) if target is None else target for target in out]
        grads.run(
            lambda C, table: C.trimmed_mean_(table, trim_number, targets),
            lambda ops: ops.trimmed_mean_(grads.flat(), grads.num_tasks, trim_number, targets),
        )
    return [None if shape is None else x for x, shape in zip(out, grads.shapes, strict=True)]


@fake("trimmed_mean")
def _fake_trimmed_mean(rows: list[Tensor | None], num_tasks: int, trim_number: int) -> list[Tensor]:
    return like_gradients(rows, num_tasks)


@fake("trimmed_mean_")
def _fake_trimmed_mean_(rows: list[Tensor | None], num_tasks: int, trim_number: int, out: list[Tensor]) -> None:
    return None
