"""PCD: priority-constrained descent (TMLR 2026, arXiv 2606.29521) on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import BY_NOISE, Group
from mtlfast.reference.nonnegative import nonnegative_least_squares


def pcd(group: Group) -> Tensor:
    """Weights [K]; shares: tau of each task; state: [2 * (n + 1)]."""
    beta, eps, tau, rtol = (group.params[name] for name in ("beta", "eps", "tau", "rtol"))
    matrix = group.matrix
    assert group.state is not None
    rows = group.state[: group.state.numel() // 2 * 2].view(-1, 2)[1:]
    means = []
    for k, task in enumerate(group.present):
        rows[task, 0] = beta * rows[task, 0] + (1 - beta) * matrix[k] @ matrix[k]
        rows[task, 1] += 1
        means.append(rows[task, 0] / (1 - beta ** float(rows[task, 1])))
    v = torch.stack(means)
    v = v + eps * v.mean()
    scale = torch.where(v > 0, v.rsqrt(), 0.0)
    if not matrix[0].any():
        return torch.zeros_like(scale)
    scaled = scale[:, None] * matrix
    shares = group.inputs.get("shares", torch.full_like(scale, tau))
    wanted = shares[1:] * scaled[1:].square().sum(dim=1)
    w = torch.cat([torch.ones_like(scale[:1]), _multipliers(scaled[0], scaled[1:], wanted)])
    direction = w @ scaled
    cancels = bool(direction @ direction <= rtol * (w.abs() @ scaled.norm(dim=1)) ** 2)
    group.tally(BY_NOISE, cancels)
    if cancels:
        return torch.zeros_like(scale)
    weights: Tensor = matrix[0].norm() / direction.norm() * w * scale
    return weights


def _multipliers(target: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """m >= 0 of the d = target + m rows nearest to the target with rows d >= wanted; zeros if there is no such d.

    Lawson and Hanson's least-distance programming: z = d - target satisfies E z >= f, and the u >= 0 of least
    |(E, f)^T u - (0, 1)| gives z, or shows with a residual of zero that no z does.
    """
    shortfall = wanted - rows @ target
    if not len(rows):
        return shortfall
    unit = shortfall.abs().max().clamp(min=1e-300)
    A = torch.cat([rows.T, (shortfall / unit)[None]])
    b = torch.zeros_like(A[:, 0])
    b[-1] = 1
    u = nonnegative_least_squares(A, b)
    residual = b - A @ u
    return torch.zeros_like(u) if residual[-1] < 1e-9 else u * unit / residual[-1]
