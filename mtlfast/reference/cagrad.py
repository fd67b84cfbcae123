"""CAGrad (Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021) on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.dual_cone import nearest_in_dual_cone
from mtlfast.reference.group import BY_NOISE, Group
from mtlfast.reference.nonnegative import shortest_in_hull


def cagrad(group: Group) -> Tensor:
    """Weights [K]; rescale: 0 none, 1 over 1 + c^2, 2 over 1 + c.

    The dual problem, min over the simplex of g_w g_0 + c |g_0| |g_w|, by bisection on h = |g_w| / (c |g_0|): for a
    given h its minimiser is the shortest vector among g_i + h g_0.
    """
    c, rescale, norm_eps, rtol = (group.params[name] for name in ("c", "rescale", "norm_eps", "rtol"))
    matrix = group.matrix
    mean = matrix.mean(dim=0)
    radius, longest = c * float(mean.norm()), float(matrix.norm())
    uniform = torch.full_like(matrix[:, 0], 1 / len(matrix))
    factor = 1 / (1 + c * c) if rescale == 1 else 1 / (1 + c) if rescale == 2 else 1.0
    if radius == 0:
        return factor * uniform
    low, high = 0.0, longest / radius
    for _ in range(60):
        h = (low + high) / 2
        w = shortest_in_hull(matrix + h * mean)
        if float((w @ matrix).norm()) > radius * h:
            low = h
        else:
            high = h
    norm = (w @ matrix).norm()
    zero = bool(norm <= max(1e-6, rtol**0.5) * (w @ matrix.norm(dim=1)))
    group.tally(BY_NOISE, zero)
    if norm_eps > 0 and norm <= norm_eps * longest:
        return torch.zeros_like(w)
    # Zero at the minimum: of the directions with which no task loses, the nearest to g_0.
    if zero:
        added = nearest_in_dual_cone(matrix, uniform) - uniform
        way = float((added @ matrix).norm())
        return factor * (uniform + min(1.0, radius / way if way > 0 else 1.0) * added)
    weights: Tensor = factor * (uniform + radius / norm * w)
    return weights
