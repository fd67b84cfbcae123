"""Weights that an optimizer learns: give it the weighting's parameters beside the model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlfast._numbers import plain, shown
from mtlfast.weighting._base import LossWeighting


class UW(LossWeighting):
    """Weighs tasks by their learned uncertainty: sum_k 1/2 exp(-s_k) L_k + 1/2 s_k with s_k = log sigma_k^2.

    Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics" (CVPR
    2018); a classification task has exp(-s_k) L_k + 1/2 s_k. Also called `UncertaintyWeighting`.

    Args:
        num_tasks: n.
        classification: [n], which tasks' losses are cross entropies; None: none, as in torchjd.scalarization.

    Raises:
        ValueError: `classification` has not n entries, or one is neither True nor False.

    Parameter: `log_var` [n], from 0.
    """

    paper = "Kendall et al., CVPR 2018"
    keeps = "n parameters"
    factors: Tensor

    def __init__(self, num_tasks: int, classification: Sequence[bool] | None = None) -> None:
        super().__init__(num_tasks)
        n = self._known_tasks()
        kinds = [False] * n if classification is None else [plain(kind) for kind in classification]
        if len(kinds) != n:
            raise ValueError(f"UW: classification has {len(kinds)} entries, expected {n} as num_tasks says")
        if any(kind not in (False, True) for kind in kinds):
            raise ValueError(f"UW: classification is {shown(classification)}, expected {n} of True and False")
        self.log_var = nn.Parameter(torch.zeros(n))
        self.register_buffer("factors", torch.tensor([1.0 if kind else 0.5 for kind in kinds], dtype=torch.float64))

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        log_var = self._of(self.log_var, tasks)
        factors = self._of(self.factors, tasks).to(values.dtype)
        return (factors * torch.exp(-log_var) * values + 0.5 * log_var).sum()

    def reset(self) -> None:
        """Sets the parameters to 0."""
        nn.init.zeros_(self.log_var)


class IMTLL(LossWeighting):
    """Learns scales that bring all losses to one size: sum_k exp(s_k) L_k - s_k.

    Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021).

    Args:
        num_tasks: n.

    Parameter: `log_scale` [n], from 0.
    """

    paper = "Liu et al., ICLR 2021"
    keeps = "n parameters"

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.log_scale = nn.Parameter(torch.zeros(self._known_tasks()))

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        log_scale = self._of(self.log_scale, tasks)
        return (torch.exp(log_scale) * values - log_scale).sum()

    def reset(self) -> None:
        """Sets the parameters to 0."""
        nn.init.zeros_(self.log_scale)
