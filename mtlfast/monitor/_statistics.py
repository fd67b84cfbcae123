"""`Statistics`: the steps of a window in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mtlfast.monitor._steps import Steps


@dataclass(frozen=True)
class Statistics:
    """What the last steps have in common, of n tasks. All tensors are float64 on the host, NaN where nothing is known.

    A task counts in the steps in which it was present, and a pair where both were and neither gradient was zero. Steps
    with a loss or a gradient that is not finite do not count.

    Attributes:
        names: the n tasks' names.
        steps: the number of steps that count.
        not_finite: the number of steps in the window that do not count, since something in them is not finite.
        cosines: [n, n], the mean cosine of two tasks' gradients.
        errors: [n, n], the standard error of that mean.
        together: [n, n], the number of steps that it is the mean of.
        conflict_rate: [n, n], the share of these steps in which the cosine was negative.
        norms: [n], the geometric mean of a gradient's lengths, without the loss scale.
        weights: [n], the mean weight of a task's gradient in the update; with groups the mean over these too.
        shares: [n], the mean part of a task in the summed lengths of the weighted gradients: what of the update is its
            own. For a method without weights, of the gradients themselves.
        losses: [n], the mean loss, without the loss scale.
        condition: the median over the steps of the condition number of the Gram matrix of unit gradients: 1 if all
            gradients are orthogonal, infinite if one is a combination of the others.
    """

    names: tuple[str, ...]
    steps: int
    not_finite: int
    cosines: Tensor
    errors: Tensor
    together: Tensor
    conflict_rate: Tensor
    norms: Tensor
    weights: Tensor
    shares: Tensor
    losses: Tensor
    condition: float

    @classmethod
    def of(cls, steps: Steps, names: tuple[str, ...]) -> Statistics:
        """The statistics of steps on the host."""
        known = ~steps.cosines.isnan()
        together = known.sum(0)
        means = steps.cosines.nanmean(0)
        spread = (steps.cosines - means).square().nansum(0) / (together - 1).clamp(min=1)
        return cls(
            names=names,
            steps=int(steps.counted.sum()),  # host: here and below
            not_finite=int(steps.not_finite.sum()),
            cosines=means,
            errors=torch.where(together > 1, (spread / together).sqrt(), torch.nan),
            together=together.double(),
            conflict_rate=torch.where(known, (steps.cosines < 0).double(), torch.nan).nanmean(0),
            norms=torch.where(steps.norms > 0, steps.norms.log(), torch.nan).nanmean(0).exp(),
            weights=steps.weights.nanmean(0),
            shares=steps.shares.nanmean(0),
            losses=steps.losses.nanmean(0),
            condition=median_condition(steps),
        )

    @property
    def ratios(self) -> Tensor:
        """[n, n], how many times as long the gradient of a row's task is as that of a column's."""
        return self.norms.unsqueeze(1) / self.norms.unsqueeze(0)

    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of tasks that have been seen together."""
        return [(i, j) for i, j in combinations(range(len(self.names)), 2) if self.together[i, j] > 0]

    def scalars(self) -> dict[str, float]:
        """All that is known and finite, by names such as "cosine/depth against edges"."""
        found: dict[str, float] = {}
        for i, j in self.pairs():
            pair = f"{self.names[i]} against {self.names[j]}"
            found[f"cosine/{pair}"] = float(self.cosines[i, j])
            found[f"conflict rate/{pair}"] = float(self.conflict_rate[i, j])
        for what in ("norm", "weight", "share"):
            values = getattr(self, f"{what}s")
            found |= {f"{what}/{name}": float(value) for name, value in zip(self.names, values, strict=True)}
        found |= {f"loss/{name}": float(value) for name, value in zip(self.names, self.losses, strict=True)}
        found |= {"condition number": self.condition, "steps not finite": float(self.not_finite)}
        return {name: value for name, value in found.items() if abs(value) < torch.inf}


def median_condition(steps: Steps) -> float:
    """The median condition number of the steps' unit gradients' Gram matrix. Absent and zero gradients do not count."""
    cosines = steps.cosines[steps.counted]
    if not len(cosines):
        return torch.nan
    # A row of the identity has the eigenvalue 1, which lies between the least and the largest of the others.
    identity = torch.eye(cosines.shape[-1], dtype=cosines.dtype).expand_as(cosines)
    eigenvalues = torch.linalg.eigvalsh(torch.where(cosines.isnan(), identity, cosines))
    return float((eigenvalues[:, -1] / eigenvalues[:, 0].clamp(min=0)).median())
