"""The Gram matrix of the task gradients, and their norms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._check import MOST_GROUPS, check_grads, check_groups, check_other, is_index
from mtlfast.ops._fake import example, fake
from mtlfast.ops._precision import exact_sums
from mtlfast.task_gradients import TaskGradients


def gram(
    grads: TaskGradients,
    other: TaskGradients | None = None,
    precision: str | None = None,
    groups: Sequence[int] | None = None,
    num_groups: int | None = None,
) -> Tensor:
    """The Gram matrix G = J J^T: the dot products of the tasks' gradients.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        other: K' tasks x the same T tensors, such as the gradients of a second batch. The result is then the cross-Gram
            matrix, the dot products of each gradient of `grads` with each of `other`. Its strides may differ from those
            of `grads`, in which case the tensors of `other` that differ are copied.
        precision: how products of float32, bfloat16 and float16 gradients are summed. "exact": exact products in
            float64 sums. "fast": float32 sums of at most 64 products, which are then added in float64. None: exact for
            K <= 4 (and K' <= 4) or P <= 4 * 2**20, fast otherwise. float64 gradients are always summed in float64.
        groups: T indices that assign each tensor to a group. Each group has a matrix of its own, from the same read; P
            counts the elements of all groups.
        num_groups: G, how many groups there are. None: one more than the largest index.

    Returns:
        [K, K] float64 on the gradients' device, symmetric; with `other` [K, K']; with `groups` [G, K, K] or [G, K, K'].
        For P up to 1e9 the error of an entry is at most 1e-13 times the sum of |a_i b_i| with exact sums or float64
        gradients, and at most 1e-6 times that with fast sums. Fast sums need products that float32 can hold, so
        elements between 1e-19 and 1e19 in size.

    Raises:
        TypeError: `grads` or `other` is not a TaskGradients, or they differ in dtype; `groups` or `num_groups` are not
            integers.
        ValueError: `other` differs from `grads` in its number of tensors, the shape of one, or the device; `precision`
            is none of these; `groups` does not have an index below G for each tensor, or there are more than 2**21
            groups.

    Cost: one read of K * P, or of (K + K') * P, and on a GPU as many launches with groups as without. Deterministic:
    bitwise the same for any number of threads.

    Example:
        >>> import torch, mtlfast
        >>> grads = mtlfast.TaskGradients.from_matrix(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        >>> mtlfast.ops.gram(grads)
        tensor([[ 5., -5.],
                [-5., 25.]], dtype=torch.float64)
        >>> other = mtlfast.TaskGradients.from_matrix(torch.tensor([[1.0, 1.0]]))
        >>> mtlfast.ops.gram(grads, other=other)
        tensor([[ 3.],
                [-1.]], dtype=torch.float64)
    """
    check_grads("gram", grads)
    if other is not None:
        check_other("gram", other, grads)
    number = _number_of_groups("gram", groups, num_groups, grads)
    exact = all(exact_sums("gram", x, precision) for x in (grads, other) if x is not None)
    # The rows of both, of which the kernel sums the products of the first `split` with the others; 0: all products.
    rows, split = (grads, 0) if other is None else (TaskGradients([*grads.rows, *other.rows]), grads.num_tasks)
    if not _native.serves(rows.device):
        return reference.gram(grads, other, precision, groups, number)
    result: Tensor = rows.run(
        lambda C, table: C.gram(table, exact, split, groups, number),
        lambda ops: ops.gram(rows.flat(), rows.num_tasks, exact, split, groups, number),
    )
    return result


def norms(
    grads: TaskGradients, order: int = 2, groups: Sequence[int] | None = None, num_groups: int | None = None
) -> Tensor:
    """The norm of each task's gradient over all tensors.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        order: 2 for the Euclidean norm, or 1 for the sum of the absolute values, which plain torch computes tensor by
            tensor.
        groups: as in `gram`.
        num_groups: as in `gram`.

    Returns:
        [K] or [G, K] float64 on the gradients' device, as exact as the diagonal of `gram` with exact sums.

    Raises:
        TypeError: `grads` is not a TaskGradients; `groups` as in `gram`.
        ValueError: `order` is neither 1 nor 2; `groups` as in `gram`.

    Cost: one read of K * P. Deterministic: bitwise the same for any number of threads.
    """
    check_grads("norms", grads)
    number = _number_of_groups("norms", groups, num_groups, grads)
    if order not in (1, 2):
        raise ValueError(f"norms: order is {order!r}, expected 1 or 2")
    if order == 1:
        return _absolute_sums(grads, groups, number)
    if not _native.serves(grads.device):
        return reference.norms(grads, groups=groups, num_groups=number)
    result: Tensor = grads.run(
        lambda C, table: C.norms(table, groups, number),
        lambda ops: ops.norms(grads.flat(), grads.num_tasks, groups, number),
    )
    return result


def _number_of_groups(op: str, groups: Sequence[int] | None, num_groups: int | None, grads: TaskGradients) -> int:
    """G, which is 1 without groups; raises unless the groups fit."""
    if groups is None:
        return 1
    if num_groups is not None:
        if not is_index(num_groups):
            raise TypeError(f"{op}: num_groups is {num_groups!r}, expected an integer")
        if not (least := min(1, len(grads.shapes))) <= num_groups <= MOST_GROUPS:
            raise ValueError(f"{op}: num_groups is {num_groups}, expected {least} to {MOST_GROUPS}")
    return check_groups(op, groups, len(grads.shapes), num_groups)


def _absolute_sums(grads: TaskGradients, groups: Sequence[int] | None, num_groups: int) -> Tensor:
    """[K] or [G, K] float64."""
    sums = torch.zeros(num_groups, grads.num_tasks, dtype=torch.float64, device=grads.device)
    for k, row in enumerate(grads.rows):
        for t, gradient in enumerate(row):
            if gradient is not None:
                norm = torch.linalg.vector_norm(gradient.detach(), 1, dtype=torch.float64)
                sums[0 if groups is None else groups[t], k] += norm
    return sums[0] if groups is None else sums


@fake("gram")
def _fake_gram(
    rows: list[Tensor | None],
    num_tasks: int,
    exact: bool,
    split: int = 0,
    groups: Sequence[int] | None = None,
    num_groups: int = 1,
) -> Tensor:
    shape = (split, num_tasks - split) if split > 0 else (num_tasks, num_tasks)
    leading = () if groups is None else (num_groups,)
    return example(rows).new_empty((*leading, *shape), dtype=torch.float64)


@fake("norms")
def _fake_norms(
    rows: list[Tensor | None], num_tasks: int, groups: Sequence[int] | None = None, num_groups: int = 1
) -> Tensor:
    leading = () if groups is None else (num_groups,)
    return example(rows).new_empty((*leading, num_tasks), dtype=torch.float64)
