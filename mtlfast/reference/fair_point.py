"""Nash-MTL (Navon et al., ICML 2022) and FairGrad (Ban and Ji, ICML 2024) on the K x P matrix."""

import math

import torch
from torch import Tensor

from mtlfast.reference.group import BY_NOISE, UNCONVERGED, Group
from mtlfast.reference.nonnegative import shortest_in_hull
from mtlfast.reference.singular import unit_rows


def nash_mtl(group: Group) -> Tensor:
    """Weights [K]; state: [3 + n], the counters, steps, each task's last weight."""
    max_norm, every, rtol = (group.params[name] for name in ("max_norm", "update_weights_every", "rtol"))
    assert group.state is not None
    kept = torch.stack([group.state[3 + task] for task in group.present])
    if float(group.state[2]) % every == 0 or not bool((kept > 0).all()):
        units, norms = unit_rows(group.matrix)
        preferences = group.inputs.get("preferences", torch.ones_like(norms))
        b, none = fair_point(units, (preferences / preferences.mean()).log(), 1.0, rtol)
        if not norms.any():
            kept = torch.zeros_like(norms)
        elif b is None:
            kept = shortest_in_hull(group.matrix)
            group.tally(UNCONVERGED, True)
            group.tally(BY_NOISE, none)
        else:
            kept = torch.where(norms > 0, group.loss_scale() * b / norms, 0.0)
        for task, weight in zip(group.present, kept, strict=True):
            group.state[3 + task] = weight
    group.state[2] += 1
    length, most = (kept @ group.matrix).norm(), max_norm * group.loss_scale()
    return kept * (most / length) if length > most > 0 else kept


def fairgrad(group: Group) -> Tensor:
    """Weights [K]; state: [2], the counters."""
    alpha, rtol = group.params["alpha"], group.params["rtol"]
    units, norms = unit_rows(group.matrix)
    if alpha == 0:
        return torch.full_like(norms, 1 / len(norms))
    if not norms.any():
        return norms
    power, size = 1 / alpha, norms.norm()
    relative = norms / size
    b, none = fair_point(units, torch.where(norms > 0, (power - 1) * relative.log(), 0.0), power, rtol)
    if b is None:
        group.tally(UNCONVERGED, True)
        group.tally(BY_NOISE, none)
        return shortest_in_hull(group.matrix)
    scale = (float(size) / group.loss_scale()) ** (-2 / (1 + power))
    return torch.where(norms > 0, scale * b / relative, 0.0)


def fair_point(units: Tensor, log_c: Tensor, p: float, rtol: float) -> tuple[Tensor | None, bool]:
    """The b > 0 with (S b)_i = c_i b_i^(-p) for S = U U^T, by Newton's method on the convex function it minimises.

    None if it was not found, and whether there is none: |b U|^2 / (sum b)^2 is no more than rtol, or than what rounding
    leaves of it.
    """
    rtol = max(rtol, 1e-12)
    rows = units.any(dim=1)
    S, c = (units @ units.T)[rows][:, rows], log_c[rows].exp()

    def push(b: Tensor) -> Tensor:
        return c * b**-p

    def value(b: Tensor) -> tuple[float, float]:
        gains = c * b.log() if p == 1 else c * b ** (1 - p) / (1 - p)
        square = b @ S @ b / 2
        return float(square - gains.sum()), float(square + gains.abs().sum())

    b = c ** (1 / (1 + p))
    if len(b) and (start := b @ S @ b) > 0:
        b = b * ((b * push(b)).sum() / start) ** (1 / (1 + p))
    for _ in range(1000):
        residual = push(b) - S @ b
        scale = push(b) + S.abs() @ b
        if not bool((b @ S @ b > rtol * b.sum() ** 2).all()):
            return None, True
        if not bool((residual.abs() > 1e-14 * (8 + abs(math.log(float(b.max())))) * scale).any()):
            break
        # Times b from both sides: entries then are near 1, whatever the tasks' weights.
        hessian = b[:, None] * S * b + (p * b * push(b)).diag()
        root = hessian.diagonal().sqrt()
        step = torch.linalg.solve(hessian / root / root[:, None], b * residual / root) / root
        share = min(1.0, 0.9 / max(1e-300, float(-step.min())))
        (before, size), slope = value(b), float((step * b * residual).sum())
        while share > 1e-8 and value(b * (1 + share * step))[0] > before - 1e-4 * share * slope + 1e-14 * size:
            share /= 2
        b = b * (1 + share * step)
    else:
        return None, False
    found = torch.zeros_like(log_c)
    found[rows] = b
    return found, False
