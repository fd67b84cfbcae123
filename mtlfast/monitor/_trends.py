"""Whether losses fall, stall or rise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtlfast.monitor._steps import Steps

LEAST_STEPS = 20  # fewer say nothing
ERRORS = 3  # a rise within so many standard errors may be noise
CHANGE = 0.02  # and a change below this part of the loss does not matter


@dataclass(frozen=True)
class Trends:
    """The losses of n tasks in the older and the newer half of the last steps, and since the run began.

    Attributes:
        earlier: [n], the mean loss in the older half.
        later: [n], in the newer half.
        lowest: [n], the lowest mean of the older half and of any window of the run.
        noise: [n], the standard error of the difference of two such means; NaN if there are too few steps.
    """

    earlier: Tensor
    later: Tensor
    lowest: Tensor
    noise: Tensor

    @classmethod
    def of(cls, steps: Steps, past: Tensor) -> Trends:
        """The trends of steps on the host, given the mean losses [H, n] of earlier windows."""
        half = len(steps.losses) // 2
        halves = (steps.losses[:half], steps.losses[half:])
        earlier, later = (losses.nanmean(0) for losses in halves)
        variance = torch.zeros_like(earlier)
        enough = torch.ones_like(earlier, dtype=torch.bool)
        for losses, mean in zip(halves, (earlier, later), strict=True):
            number = (~losses.isnan()).sum(0)
            variance += (losses - mean).square().nansum(0) / (number * (number - 1)).clamp(min=1)
            enough &= number >= LEAST_STEPS // 2
        lowest = torch.cat([past, earlier.unsqueeze(0)]).nan_to_num(torch.inf).amin(0)
        return cls(earlier, later, lowest, torch.where(enough, variance.sqrt(), torch.nan))

    def rising(self) -> list[int]:
        """The tasks whose loss is above its lowest, by more than noise explains."""
        bounds = torch.maximum(ERRORS * self.noise, CHANGE * self.lowest.abs())
        return (self.later - self.lowest > bounds).nonzero().flatten().tolist()

    def stalled(self) -> list[int]:
        """The tasks whose loss neither falls nor rises."""
        still = self.earlier - self.later <= torch.maximum(self.noise, CHANGE * self.earlier.abs())
        return [k for k in still.nonzero().flatten().tolist() if k not in self.rising()]
