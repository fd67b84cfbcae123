"""The Gram matrix of the task gradients, and their norms."""

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._check import check_grads
from mtlfast.ops._fake import example, fake
from mtlfast.ops._precision import exact_sums
from mtlfast.task_gradients import TaskGradients


def gram(grads: TaskGradients, other: TaskGradients | None = None, precision: str | None = None) -> Tensor:
    """The Gram matrix G = J J^T of the task gradients.

    Args:
        grads: K tasks x T tensors, P elements a task.
        other: a second batch's task gradients, for the cross-Gram [K, K']; not built yet.
        precision: of the sums of float32, bfloat16 and float16 products: "exact", float64 sums of exact products;
            "fast", runs of 64 float32 sums; None: exact for K <= 4 or P <= 4 * 2**20, fast beyond. float64 gradients
            are always summed in float64.

    Returns:
        [K, K] float64 on the gradients' device, symmetric. At P = 1e9 |error| <= 1e-13 * sum|a_i b_j| for exact sums
        and float64 gradients, <= 1e-6 * sum|a_i b_j| for fast sums, whose products must be float32 numbers: elements
        between 1e-19 and 1e19 count.

    Raises:
        TypeError: `grads` is not a TaskGradients.
        NotImplementedError: `other` is given.
        ValueError: `precision` is another word.

    Cost: one read of K * P. Deterministic, bitwise, for any number of threads.
    """
    check_grads("gram", grads)
    if other is not None:
        raise NotImplementedError("gram: the cross-Gram with another batch (other=) is not built yet")
    exact = exact_sums("gram", grads, precision)
    if not _native.serves(grads.device):
        return reference.gram(grads, precision=precision)
    result: Tensor = grads.run(
        lambda C, table: C.gram(table, exact), lambda ops: ops.gram(grads.flat(), grads.num_tasks, exact)
    )
    return result


def norms(grads: TaskGradients) -> Tensor:
    """The norm of each task's gradient over all tensors.

    Args:
        grads: K tasks x T tensors, P elements a task.

    Returns:
        [K] float64 on the gradients' device; as exact as the diagonal of `gram` with exact sums.

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
def _fake_gram(rows: list[Tensor | None], num_tasks: int, exact: bool) -> Tensor:
    return example(rows).new_empty((num_tasks, num_tasks), dtype=torch.float64)


@fake("norms")
def _fake_norms(rows: list[Tensor | None], num_tasks: int) -> Tensor:
    return example(rows).new_empty((num_tasks,), dtype=torch.float64)
