"""PCGrad, Algorithm 1 of Yu et al., "Gradient Surgery for Multi-Task Learning" (NeurIPS 2020), on the K x P matrix."""

import torch
from torch import Tensor


def pcgrad(matrix: Tensor, order: Tensor | None = None) -> Tensor:
    """The projected gradients, step by step as the paper writes them.

    Args:
        matrix: the Jacobian [K, P].
        order: int64 [K, K-1], row i the other tasks in the order in which gradient i meets them. None: ascending.

    Returns:
        [K, P]; PCGrad's update is the sum of its rows.
    """
    projected = matrix.clone()
    for i, others in enumerate(_orders(len(matrix), order)):
        for j in others:
            dot = projected[i] @ matrix[j]
            if dot < 0:
                projected[i] -= dot / (matrix[j] @ matrix[j]) * matrix[j]
    return projected


def pcgrad_coefficients(matrix: Tensor, order: Tensor | None = None) -> Tensor:
    """The same walk, keeping how much of each gradient was taken away: C [K, K] with `pcgrad(matrix) = C @ matrix`."""
    projected, coefficients = matrix.clone(), torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for i, others in enumerate(_orders(len(matrix), order)):
        for j in others:
            dot = projected[i] @ matrix[j]
            if dot < 0:
                share = dot / (matrix[j] @ matrix[j])
                projected[i] -= share * matrix[j]
                coefficients[i, j] -= share
    return coefficients


def _orders(num_tasks: int, order: Tensor | None) -> list[list[int]]:
    if order is not None:
        rows: list[list[int]] = order.tolist()
        return rows
    return [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
