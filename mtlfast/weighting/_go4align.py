"""GO4Align."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real, Whole
from mtlfast.weighting._base import NeedsPositiveLosses, Weighted, shares


class GO4Align(NeedsPositiveLosses, Weighted):
    """Groups tasks that make similar progress, and gives all tasks of a group the same weight.

    Each task has an indicator (sum_j L_j / L_k) p_k. The risks p add up to 1, and each step multiplies them by
    exp(-eta L). K-means on the indicators makes the groups, and a task's weight is the mean indicator of its group.
    Shen et al., "GO4Align: Group Optimization for Multi-Task Alignment" (NeurIPS 2024).

    Args:
        num_tasks: n, the number of tasks.
        num_groups: the number of groups. With 1 all tasks share one weight; with n each has its own.
        eta: the step size of the risks.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is not positive, so that it has no
            indicator, or is so much smaller than the others that its weight is not finite.

    State: n numbers. K-means starts at evenly spread indicators and takes 20 steps.
    """

    paper = "Shen et al., NeurIPS 2024"
    keeps = "n risks"
    num_groups = Whole(1)
    eta = Real(0)
    risks: Tensor

    def __init__(self, num_tasks: int, num_groups: int = 2, eta: float = 1e-4) -> None:
        super().__init__(num_tasks)
        self.num_groups = num_groups
        self.eta = eta
        self._keep_state("risks", fill=1 / self._known_tasks())

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The mean indicator of each task's group."""
        risks = self._of(self.risks, tasks)
        held = risks.sum()  # the present tasks' share of all risks
        # Subtracting the smallest loss changes no weight and keeps exp(-eta L) of large losses from becoming 0.
        risks = shares(risks * (-self.eta * (values - values.amin())).exp(), 1.0)
        weights = grouped(values.sum() / values * risks, min(self.num_groups, len(tasks)))
        weights = weights * self._one_if_finite(weights, values, tasks, terms=weights * values)
        least = torch.finfo(values.dtype).tiny  # a risk of 0 could never rise again
        self._move(self.risks, tasks, (held * risks).clamp(min=least), when=weights.isfinite().all())
        return weights

    def reset(self) -> None:
        super().reset()
        self.risks.fill_(1 / len(self.risks))


def grouped(values: Tensor, num_groups: int) -> Tensor:
    """Replaces each of K numbers by the mean of its group, with k-means in one dimension."""
    ordered = values.sort().values
    last = len(values) - 1
    spread = [round(group * last / max(1, num_groups - 1)) for group in range(num_groups)]
    centres = torch.stack([ordered[place] for place in spread]) if num_groups > 1 else values.mean().reshape(1)
    for _ in range(20):
        member = (values[:, None] - centres).abs().argmin(dim=1)
        belongs = member[:, None] == torch.arange(num_groups, device=values.device)
        counts = belongs.sum(dim=0)
        means = (belongs * values[:, None]).sum(dim=0) / counts.clamp(min=1)
        centres = torch.where(counts > 0, means, centres)
    return centres[member]
