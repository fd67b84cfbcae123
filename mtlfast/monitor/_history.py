"""Means of each whole window since the run began, so that the run can be seen when its steps are forgotten."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mtlfast.monitor._steps import Steps


class Means(NamedTuple):
    """Means over the steps of a window, or H of these along a new dimension. NaN stands for what was never known.

    Attributes:
        losses: [n] or [H, n].
        cosines: [n, n] or [H, n, n].
        shares: [n] or [H, n].
    """

    losses: Tensor
    cosines: Tensor
    shares: Tensor

    @classmethod
    def of(cls, steps: Steps) -> Means:
        """The means over all the steps, on their device."""
        return cls(*(x.nanmean(0) for x in (steps.losses, steps.cosines, steps.shares)))

    @classmethod
    def stacked(cls, rows: list[Means], num_tasks: int) -> Means:
        """The rows of a run on the host, the oldest first. Tasks that came later have NaN before."""
        # A run that goes on elsewhere has rows on both devices.
        wide = [cls(*(_widened(x.cpu(), num_tasks) for x in row)) for row in rows]
        if not wide:
            shapes = ((0, num_tasks), (0, num_tasks, num_tasks), (0, num_tasks))
            return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
        return cls(*(torch.stack(xs) for xs in zip(*wide, strict=True)))


def _widened(values: Tensor, num_tasks: int) -> Tensor:
    return F.pad(values, (0, num_tasks - values.shape[-1]) * values.dim(), value=torch.nan)
