"""`LossRescaling`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtlfast._settings import Choice, Real
from mtlfast.weighting._base import NeedsPositiveLosses


class LossRescaling(NeedsPositiveLosses):
    """Brings all losses to one scale, then adds them up.

    Args:
        num_tasks: n, the number of tasks.
        by: "first" divides each loss by its value at the task's first step. "mean" divides it by its running mean m_k =
            decay m_k + (1 - decay) L_k, which starts as the first value and includes the present step. "log" sums the
            logarithms of the losses, whose gradient divides each loss by its present value. With "first" and "mean" a
            task whose losses have all been 0 has the weight 1.
        decay: the decay of the running mean, 0 to 1.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is negative, is 0 with "log", or is so small
            that its weight is not finite.

    State: n numbers.
    """

    keeps = "n losses"
    by = Choice("first", "mean", "log")
    decay = Real(0, 1)
    scales: Tensor

    def __init__(self, num_tasks: int, by: Literal["first", "mean", "log"] = "first", decay: float = 0.99) -> None:
        super().__init__(num_tasks)
        self.by = by
        self.decay = decay
        self._keep_state("scales", fill=torch.nan)

    def _takes_zero(self) -> bool:
        """True for every scale but the logarithm."""
        return self.by != "log"

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            now, old = values.detach().double(), self._of(self.scales, tasks)
            kept = old if self.by == "first" else self.decay * old + (1 - self.decay) * now
            scales = now if self.by == "log" else torch.where(old.isnan(), now, kept)
            known = scales > 0
            # Losses of 0 let a mean fall to 0. The divisor is bounded so that the weight stays a number of the losses'
            # dtype.
            least = (now == 0) * torch.full_like(now, 2 / self._largest_weight)
            divisors = torch.where(scales == 0, 1.0, torch.maximum(scales, least)).to(values.dtype)
            one = self._one_if_finite(1 / divisors, values, tasks, terms=values / divisors)
            if self.by != "log":
                self._move(self.scales, tasks, scales, when=(now * one).isfinite() & known)
        return (values * one).log().sum() if self.by == "log" else (values * one / divisors).sum()

    def reset(self) -> None:
        super().reset()
        self.scales.fill_(torch.nan)
