"""PCGrad, Algorithm 1 of Yu et al., "Gradient Surgery for Multi-Task Learning" (NeurIPS 2020), on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group


def pcgrad(matrix: Tensor, order: Tensor | None = None) -> Tensor:
    """The projected gradients, step by step as the paper writes them.

    Args:
        matrix: the Jacobian [K, P].
        order: int64 [K, K-1], row i the other tasks in the order in which gradient i meets them. None: ascending.

    Returns:
        [K, P]; PCGrad's update is the sum of its rows.
    """
    return _walk(matrix, Group(matrix).orders() if order is None else order.tolist())[0]


def pcgrad_coefficients(matrix: Tensor, order: Tensor | None = None) -> Tensor:
    """The same walk, keeping how much of each gradient was taken away: C [K, K] with `pcgrad(matrix) = C @ matrix`."""
    return _walk(matrix, Group(matrix).orders() if order is None else order.tolist())[1]


def coefficients_of(group: Group) -> Tensor:
    """The solver's twin: C [K, K]."""
    return _walk(group.matrix, group.orders())[1]


def weights_of(group: Group) -> Tensor:
    """The solver's twin: C's columns, added up or averaged (mean); does each meet itself (itself)?

    With `turns` the protected tasks meet nobody, and the others meet those alone, by ascending turn.
    """
    if "turns" in group.inputs:
        turns = group.inputs["turns"].tolist()
        protected = sorted((k for k, turn in enumerate(turns) if turn >= 0), key=lambda k: turns[k])
        orders = [[] if k in protected else protected for k in range(group.num_tasks)]
    else:
        orders = group.orders(itself=bool(group.params["itself"]))
    coefficients = _walk(group.matrix, orders)[1]
    return coefficients.mean(dim=0) if group.params["mean"] else coefficients.sum(dim=0)


def _walk(matrix: Tensor, orders: list[list[int]]) -> tuple[Tensor, Tensor]:
    projected, coefficients = matrix.clone(), torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for i, others in enumerate(orders):
        for j in others:
            dot = projected[i] @ matrix[j]
            if dot < 0:
                share = dot / (matrix[j] @ matrix[j])
                projected[i] -= share * matrix[j]
                coefficients[i, j] -= share
    return projected, coefficients
