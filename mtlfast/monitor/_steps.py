"""What follows from the numbers of each step, before anything is averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlfast.monitor._rings import Rings


@dataclass(frozen=True)
class Steps:
    """S steps of n tasks, the oldest first. NaN stands for what is not known or does not count.

    A step in which a present task's loss or gradient is not finite does not count. Nothing here waits for a GPU.

    Attributes:
        counted: [S] bool, the steps that count.
        not_finite: [S] bool, the steps that do not, since something in them is not finite.
        losses: [S, n], without the loss scale.
        norms: [S, n], the lengths of the gradients, without the loss scale.
        cosines: [S, n, n], also NaN if a gradient is zero.
        weights: [S, n], means over the groups.
        shares: [S, n], each task's part of the summed lengths of the weighted gradients. Weights that are not known
            count as 1.
    """

    counted: Tensor
    not_finite: Tensor
    losses: Tensor
    norms: Tensor
    cosines: Tensor
    weights: Tensor
    shares: Tensor

    @classmethod
    def of(cls, rings: Rings, group: int | None = None) -> Steps:
        """The steps whose numbers are in the rings, in one group, or in all shared parameters."""
        squares = rings.gram.diagonal(dim1=-2, dim2=-1)  # [S, G, n]
        present = ~(squares[:, 0] < 0)
        finite = rings.gram.isfinite().flatten(1).all(1) & (rings.losses.isfinite() | ~present).all(1)
        seen = present.any(1)
        present = present & (seen & finite).unsqueeze(1)
        chosen = slice(None) if group is None else slice(group, group + 1)

        scales = rings.scales.unsqueeze(1)
        gram = rings.gram[:, chosen].sum(1)
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        known = torch.where(present, norms, torch.nan)
        weights = rings.weights[:, chosen]
        weighted = torch.where(weights.isnan(), 1, weights).square() * squares[:, chosen]
        lengths = torch.where(present, weighted.sum(1).sqrt(), 0)
        return cls(
            counted=seen & finite,
            not_finite=seen & ~finite,
            losses=torch.where(present, rings.losses / scales, torch.nan),
            norms=known / scales,
            cosines=gram / (known.unsqueeze(-1) * known.unsqueeze(-2)),  # 0 / 0 where a gradient is zero
            weights=torch.where(present, weights.mean(1), torch.nan),
            shares=torch.where(present, lengths / lengths.sum(1, keepdim=True), torch.nan),
        )
