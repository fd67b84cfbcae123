"""GradVac, Algorithm 1 of Wang et al., "Gradient Vaccine" (ICLR 2021), on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group


def gradvac(group: Group) -> Tensor:
    """Weights [K]; state: [(n + 1) * n], solves that met a gradient that vanished, then the pairs' running cosines."""
    beta, eps, rtol = (group.params[name] for name in ("beta", "eps", "rtol"))
    least = 0.0 if eps > 0 else 1e-8
    assert group.state is not None
    known = max(n for n in range(group.state.numel()) if (n + 1) * n <= group.state.numel())
    matrix, targets, tasks = group.matrix, group.state[known : (known + 1) * known].view(known, known), group.present
    vanished = False
    turned, lengths = matrix.clone(), matrix.norm(dim=1)
    coefficients = torch.eye(len(matrix), dtype=matrix.dtype)
    for i, others in enumerate(group.orders()):
        for j in others:
            norm, norm_j = turned[i].norm(), matrix[j].norm()
            magnitude = coefficients[i].abs() @ lengths  # what the norm's rounding error is relative to
            if norm**2 <= rtol * magnitude**2:
                vanished = vanished or bool(magnitude > 0)
                continue
            if norm_j == 0:
                continue
            cosine = (turned[i] @ matrix[j] / (norm * norm_j + eps)).clamp(-1, 1)
            target = targets[tasks[i], tasks[j]].clone()
            if cosine < target:
                sine, target_sine = (1 - cosine**2).clamp(min=0).sqrt(), (1 - target**2).clamp(min=0).sqrt()
                step = norm * (target * sine - cosine * target_sine) / (norm_j * (target_sine + least) + eps)
                turned[i] += step * matrix[j]
                coefficients[i, j] += step
            targets[tasks[i], tasks[j]] = (1 - beta) * target + beta * cosine
    group.state[0] += vanished
    return coefficients.sum(dim=0)
