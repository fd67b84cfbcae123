"""Losses brought to one scale."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtlfast._settings import Choice, Real
from mtlfast.weighting._base import OfPositive


class LossRescaling(OfPositive):
    """Brings all losses to one scale, then adds them up.

    "first": sum_k L_k / L_k(0), by the value at the task's first step; "mean": sum_k L_k / m_k, by the running mean
    m_k = decay m_k + (1 - decay) L_k, which starts as the first value and has the present step in it; "log":
    sum_k log L_k, whose gradient is that of sum_k L_k / L_k at each step.

    Args:
        num_tasks: n.
        by: one of these.
        decay: of the running mean, 0 to 1.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is not positive.

    State: n numbers.
    """

    keeps = "n losses"
    by = Choice("first", "mean", "log")
    decay = Real(0, 1)
    scales: Tensor

    def __init__(self, num_tasks: int, by: Literal["first", "mean", "log"] = "first", decay: float = 0.99) -> None:
        """See the class."""
        super().__init__(num_tasks)
        self.by = by
        self.decay = decay
        self._keep_buffer("scales", num_tasks, fill=torch.nan)

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The sum of the rescaled losses."""
        if self.by == "log":
            return values.log().sum()
        with torch.no_grad():
            now, old = values.detach().double(), self._of(self.scales, tasks)
            kept = old if self.by == "first" else self.decay * old + (1 - self.decay) * now
            scales = torch.where(old.isnan(), now, kept)
            self._move(self.scales, tasks, scales, when=now.isfinite())
        return (values / scales.to(values.dtype)).sum()

    def reset(self) -> None:
        """Forgets the values."""
        super().reset()
        self.scales.fill_(torch.nan)
