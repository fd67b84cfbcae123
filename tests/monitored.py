"""Steps for a monitor whose task gradients, weights and losses are made by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import StepResult
from mtlfast.monitor import ConflictMonitor


def step_of(
    rows: Sequence[Sequence[float]] | Tensor,
    *,
    losses: Sequence[float] | Tensor | None = None,
    weights: Sequence[float] | Tensor | None = None,
    tasks: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    loss_scale: float = 1.0,
) -> StepResult:
    """The result of a step with these task gradients: [K, P], or [G, K, P] with groups. Losses not given are 1."""
    J = torch.as_tensor(rows, dtype=torch.float64) * loss_scale
    K = J.shape[-2]
    return StepResult(
        losses=torch.as_tensor([1.0] * K if losses is None else losses, dtype=torch.float64) * loss_scale,
        tasks=tuple(range(K) if tasks is None else tasks),
        weights=None if weights is None else torch.as_tensor(weights, dtype=torch.float64),
        gram=J @ J.mT,
        names=None if names is None else tuple(names),
        groups=None if groups is None else tuple(groups),
    )


def fed(monitor: ConflictMonitor, steps: int, rows: Sequence[Sequence[float]] | Tensor, **others) -> ConflictMonitor:
    """The monitor, after so many steps with the same numbers."""
    for _ in range(steps):
        monitor.update(step_of(rows, **others))
    return monitor
