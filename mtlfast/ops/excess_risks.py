"""Excess risks: the size of each gradient as its own sums of squares measure it."""

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast._numbers import is_finite, shown
from mtlfast.ops._check import check_grads, check_state, check_vector
from mtlfast.ops._fake import example, fake
from mtlfast.task_gradients import TaskGradients


def excess_risks(grads: TaskGradients, sums: TaskGradients, eps: float = 1e-7, factors: Tensor | None = None) -> Tensor:
    """Each task's excess risk: the sum over its elements of g^2 / sqrt(H + g^2 + eps).

    H is the sum of the squares of earlier gradients, so H + g^2 includes this one, which `advance_(square=True)` adds.
    Paper: He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        sums: H, K tasks x T tensors, of one dtype that may be another than the gradients', with the gradients' shapes,
            device and strides. It is only read. An entry of None counts as zeros. A gradient of None counts nothing.
        eps: a positive number.
        factors: [K], of any real dtype, on the gradients' device: g is the gradient times its task's factor, such as
            1 / loss_scale. None: 1.

    Returns:
        [K] float64 on the gradients' device. Elements and sums are float64 for every dtype.

    Raises:
        ValueError, TypeError: an argument does not fit.

    Cost: one read of 2 * K * P. Deterministic: bitwise the same for any number of threads.

    Example:
        >>> import torch, mtlfast
        >>> grads = mtlfast.TaskGradients.from_matrix(torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
        >>> sums = mtlfast.TaskGradients.from_matrix(torch.tensor([[16.0, 1.0], [0.0, 3.0]]))
        >>> mtlfast.ops.excess_risks(grads, sums)
        tensor([1.8000, 1.5000], dtype=torch.float64)
    """
    check_grads("excess_risks", grads)
    check_state("excess_risks", "sums", sums, grads)
    if not is_finite(eps) or eps <= 0:
        raise ValueError(f"excess_risks: eps is {shown(eps)}, expected a positive number")
    if factors is not None:
        check_vector("excess_risks", "factors", factors, grads)
    if not _native.serves(grads.device):
        return reference.excess_risks(grads, sums, eps, factors)
    if factors is None:
        factors = torch.ones(grads.num_tasks, dtype=torch.float64, device=grads.device)
    result: Tensor = grads.run(
        lambda C, table, of_sums: C.excess_risks(table, of_sums, eps, factors),
        lambda ops: ops.excess_risks(grads.flat(), grads.num_tasks, sums.flat(), eps, factors),
        sums,
    )
    return result


@fake("excess_risks")
def _fake_excess_risks(
    rows: list[Tensor | None], num_tasks: int, sums: list[Tensor | None], eps: float, factors: Tensor
) -> Tensor:
    return example(rows).new_empty((num_tasks,), dtype=torch.float64)
