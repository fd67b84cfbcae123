"""MGDA: Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS 2018), on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group
from mtlfast.reference.nonnegative import shortest_in_hull


def mgda(group: Group) -> Tensor:
    """Weights [K]; epsilon: 0 for the optimum; norms: 1 by norm, 2 by loss, 3 both; min_weights: their lower bounds.

    Within the bounds c the combinations are those of the points c J + (1 - sum c) g_i.
    """
    epsilon, max_iters, norms = (group.params[name] for name in ("epsilon", "max_iters", "norms"))
    divisors = torch.ones_like(group.matrix[:, 0])
    if int(norms) & 1:
        divisors = divisors * group.matrix.norm(dim=1)
    if int(norms) & 2:
        divisors = divisors * group.inputs["losses"]
    matrix = torch.where(divisors[:, None] != 0, group.matrix / divisors[:, None], 0.0)
    least = group.inputs.get("min_weights")
    left = 1.0
    if least is not None:
        left = max(1 - float(least.sum()), 0.0)
        matrix = least @ matrix + left * matrix
    w = frank_wolfe(matrix, epsilon, int(max_iters)) if epsilon > 0 else shortest_in_hull(matrix)
    return w if least is None else least + left * w


def frank_wolfe(matrix: Tensor, epsilon: float, max_iters: int) -> Tensor:
    """Algorithm 2 of the paper, until a step is below epsilon."""
    w = torch.full_like(matrix[:, 0], 1 / len(matrix))
    for _ in range(max_iters):
        combined = w @ matrix
        best = int((matrix @ combined).argmin())
        a, b, c = matrix[best] @ combined, combined @ combined, matrix[best] @ matrix[best]
        gamma = 1.0 if c <= a else 0.0 if b <= a else float((b - a) / (b + c - 2 * a))
        w = (1 - gamma) * w
        w[best] += gamma
        if gamma < epsilon:
            break
    return w
