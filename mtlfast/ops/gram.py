"""The Gram matrix of the task gradients, and their norms."""

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._check import check_grads
from mtlfast.ops._fake import example, fake
from mtlfast.task_gradients import TaskGradients


def gram(grads: TaskGradients, other: TaskGradients | None = None) -> Tensor:
    """The Gram matrix G = J J^T of the task gradients.

    Args:
        grads: K tasks x T tensors, P elements a task.
        other: a second batch's task gradients, for the cross-Gram [K, K']; not built yet.

    Returns:
        [K, K] float64 on the gradients' device, symmetric; |error| <= 1e-6 * sum|a_i b_j| at P = 1e9 for float32,
        bfloat16 and float16, float64 accuracy for float64. float32 products: elements between 1e-19 and 1e19 count.

    Raises:
        TypeError: `grads` is not a TaskGradients.
        NotImplementedError: `other` is given.

    Cost: one read of K * P. Deterministic, bitwise, for any number of threads.
    """
    check_grads("gram", grads)
    if other is not None:
        raise NotImplementedError("gram: the cross-Gram with another batch (other=) is not built yet")
    if not _native.serves(grads.device):
        return reference.gram(grads)
    result: Tensor = grads.run(lambda C, table: C.gram(table), lambda ops: ops.gram(grads.flat(), grads.num_tasks))
    return result


def norms(grads: TaskGradients) -> Tensor:
    """The norm of each task's gradient over all tensors.

    Args:
        grads: K tasks x T tensors, P elements a task.

    Returns:
        [K] float64 on the gradients' device; as exact as the diagonal of `gram`.

    Raises:
        TypeError: `grads` is not a TaskGradients.

    Cost: one read of K * P. Deterministic, bitwise, for any number of threads.
    """
    check_grads("norms", grads)
    if not _native.serves(grads.device):
        return reference.norms(grads)
    result: Tensor = grads.run(lambda C, table: C.norms(table), lambda ops: ops.norms(grads.flat(), grads.num_tasks))
    return result


@fake("gram")
def _fake_gram(rows: list[Tensor | None], num_tasks: int) -> Tensor:
    return example(rows).new_empty((num_tasks, num_tasks), dtype=torch.float64)


@fake("norms")
def _fake_norms(rows: list[Tensor | None], num_tasks: int) -> Tensor:
    return example(rows).new_empty((num_tasks,), dtype=torch.float64)
