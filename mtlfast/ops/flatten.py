"""The task gradients as one matrix, and a vector split into tensors again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._check import check_dtype, check_grads
from mtlfast.ops._fake import example, fake
from mtlfast.task_gradients import TaskGradients


def flatten(grads: TaskGradients, dtype: torch.dtype | None = None) -> Tensor:
    """The Jacobian as a matrix, whose row k holds task k's gradients one tensor after the other.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        dtype: the dtype of the result: float32, float64, bfloat16 or float16. None: that of the gradients.

    Returns:
        [K, P], contiguous, with zeros where a task does not reach a tensor.

    Raises:
        TypeError: `grads` is not a TaskGradients, or `dtype` is none of the four.

    Cost: one read and one write of K * P. Deterministic.
    """
    check_grads("flatten", grads)
    dtype = grads.dtype if dtype is None else dtype
    check_dtype("flatten", dtype)
    if not _native.serves(grads.device):
        return reference.flatten(grads, dtype)
    dense = grads.contiguous()
    result: Tensor = dense.run(
        lambda C, table: C.flatten(table, dtype),
        lambda ops: ops.flatten(dense.flat(), dense.num_tasks, dtype),
    )
    return result


def unflatten(vector: Tensor, like: TaskGradients | Sequence[Tensor]) -> list[Tensor | None]:
    """Splits a vector into views with the shapes of the task gradients' tensors: the inverse of `flatten` for one row.

    Args:
        vector: [P].
        like: task gradients, or T tensors such as parameters, whose shapes the views take.

    Returns:
        T contiguous views of `vector`; None for a tensor that no task reaches.

    Raises:
        ValueError: `vector` does not have one dimension of P elements.

    Cost: no copy. Differentiable.
    """
    shapes = like.shapes if isinstance(like, TaskGradients) else tuple(tensor.shape for tensor in like)
    total = sum(shape.numel() for shape in shapes if shape is not None)
    if vector.dim() != 1 or vector.numel() != total:
        raise ValueError(f"unflatten: vector has shape {list(vector.shape)}, expected [{total}]")
    if not _native.serves(vector.device):
        return reference.unflatten(vector, like)
    examples = like.examples() if isinstance(like, TaskGradients) else like
    views = torch.ops.mtlfast.unflatten(vector, [vector.new_empty(0) if x is None else x for x in examples])
    return [None if shape is None else view for shape, view in zip(shapes, views, strict=True)]


@fake("flatten")
def _fake_flatten(rows: list[Tensor | None], num_tasks: int, dtype: torch.dtype) -> Tensor:
    num_tensors = len(rows) // num_tasks
    columns = [[row for row in rows[t::num_tensors] if row is not None] for t in range(num_tensors)]
    numel = sum(column[0].numel() for column in columns if column)
    return example(rows).new_empty((num_tasks, numel), dtype=dtype)
