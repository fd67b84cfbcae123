"""CAGrad (Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021) on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.dual_cone import nearest_in_dual_cone
from mtlfast.reference.group import BY_NOISE, Group
from mtlfast.reference.nonnegative import shortest_in_hull


def cagrad(group: Group) -> Tensor:
    """Weights [K]; rescale: 0 none, 1 over 1 + c^2, 2 over 1 + c; clip: is g_w that of the smaller of w and u?

    g_0 is u J with the preferences u, or the mean gradient.

    The dual problem, min over the simplex of g_w g_0 + c |g_0| |g_w|, by bisection on h = |g_w| / (c |g_0|): for a
    given h its minimiser is the shortest vector among g_i + h g_0.
    """
    c, rescale, norm_eps, rtol, clip = (group.params[name] for name in ("c", "rescale", "norm_eps", "rtol", "clip"))
    matrix, preferences = group.matrix, group.preferences()
    preferred = preferences @ matrix if "preferences" in group.inputs else matrix.mean(dim=0)
    radius, longest = c * float(preferred.norm()), float(matrix.norm())
    factor = 1 / (1 + c * c) if rescale == 1 else 1 / (1 + c) if rescale == 2 else 1.0
    if radius == 0:
        return factor * preferences
    low, high = 0.0, longest / radius
    for _ in range(60):
        h = (low + high) / 2
        w = shortest_in_hull(matrix + h * preferred)
        if float((w @ matrix).norm()) > radius * h:
            low = h
        else:
            high = h
    norm = (w @ matrix).norm()
    zero = _cancels(w, matrix, rtol)
    if norm_eps > 0 and norm <= norm_eps * longest:
        group.tally(BY_NOISE, zero)
        return torch.zeros_like(w)
    if clip:
        clipped = torch.minimum(w, preferences)
        nothing = _cancels(clipped, matrix, rtol)
        group.tally(BY_NOISE, zero or (nothing and bool(clipped @ matrix.norm(dim=1) > 0)))
        return factor * (preferences + (0 if nothing else radius / (clipped @ matrix).norm() * clipped))
    group.tally(BY_NOISE, zero)
    # Zero at the minimum: of the directions with which no task loses, the nearest to g_0.
    if zero:
        added = nearest_in_dual_cone(matrix, preferences) - preferences
        way = float((added @ matrix).norm())
        return factor * (preferences + min(1.0, radius / way if way > 0 else 1.0) * added)
    weights: Tensor = factor * (preferences + radius / norm * w)
    return weights


def _cancels(w: Tensor, matrix: Tensor, rtol: float) -> bool:
    """Whether the combination is no longer than what rounding leaves of its terms."""
    return bool((w @ matrix).norm() <= max(1e-6, rtol**0.5) * (w @ matrix.norm(dim=1)))
