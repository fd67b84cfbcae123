"""`UWSO`."""

from __future__ import annotations

from torch import Tensor

from mtlfast._settings import Real
from mtlfast.weighting._base import NeedsPositiveLosses, Weighted

MOST = 1e300  # exponents are cut off there: their softmax is the same, and that of infinity would be NaN


class UWSO(NeedsPositiveLosses, Weighted):
    """Gives tasks with small losses a larger weight, by a softmax of the inverse losses: w_k = softmax_k(1 / (T L_k)).

    The weights add up to 1. With the uncertainties that `UW` learns, the best weight of a task is the inverse of its
    loss. Here that is computed at each step, and the softmax keeps the weight of a small loss from growing without
    bound. A loss of 0 takes all the weight. Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in
    Multi-Task Learning" (GCPR 2024).

    The weights depend on the units of the losses, so the temperature must be tuned. Public code adds 1e-8 to the losses
    first.

    Args:
        num_tasks: n, the number of tasks. None: any number of tasks.
        temperature: T. A larger temperature makes the weights more equal.

    Raises:
        ValueError: `temperature` is not positive; on the CPU, a loss is negative.
    """

    paper = "Kirchdorfer et al., GCPR 2024"
    temperature = Real(0, least_itself=False)

    def __init__(self, num_tasks: int | None = None, temperature: float = 1.0) -> None:
        super().__init__(num_tasks)
        self.temperature = temperature

    def _takes_zero(self) -> bool:
        """True: the softmax has a limit there."""
        return True

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The softmax. A loss of -0.0 is one of 0."""
        return (1 / values.abs() / self.temperature).clamp(max=MOST).softmax(dim=0)
