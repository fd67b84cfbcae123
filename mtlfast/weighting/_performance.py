"""Weights from how well the tasks do."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.weighting._base import Losses, Weighted, shares


class _ByPerformance(Weighted):
    """A method that is told the tasks' performance, and keeps its running mean."""

    keeps = "n metrics"
    decay = Real(0, 1, most_itself=False)
    performance: Tensor

    def __init__(self, num_tasks: int, decay: float) -> None:
        super().__init__(num_tasks)
        self.decay = decay
        self._keep_buffer("performance", num_tasks, fill=torch.nan)

    @torch.no_grad()
    def update(
        self, *, losses: Losses | None = None, norms: Tensor | None = None, metrics: Losses | None = None
    ) -> None:
        """Takes the tasks' metrics, larger being better; None for a task that has none this time.

        Raises:
            ValueError: there are no metrics.
        """
        if metrics is None:
            raise ValueError(f"{type(self).__name__}: metrics is None, expected the tasks' metrics")
        given = (
            metrics
            if isinstance(metrics, Tensor)
            else [
                None if metric is None else torch.as_tensor(metric, device=self.performance.device)
                for metric in metrics
            ]
        )
        new, tasks = self._gather(given)
        new, old = new.detach().to(self.performance), self._of(self.performance, tasks)
        mean = torch.where(old.isnan(), new, self.decay * old + (1 - self.decay) * new)
        self._move(self.performance, tasks, mean, when=new.isfinite())

    def reset(self) -> None:
        """Forgets the metrics."""
        self.performance.fill_(torch.nan)


class InversePerformance(_ByPerformance):
    """Tasks that do worse weigh more: w_k = 1 / (1 + m_k) for the running mean m_k of the metric, adding up to K.

    A task whose metric is not known counts as if it were 0.

    Args:
        num_tasks: n.
        decay: of the running mean, from 0 (the last metric alone) to 1.

    Raises:
        ValueError: `decay` is outside of its range.

    State: n numbers. Feedback: `update(metrics=...)`, larger being better and above -1.
    """

    def __init__(self, num_tasks: int, decay: float = 0.0) -> None:
        """See the class."""
        super().__init__(num_tasks, decay)

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """They add up to K."""
        return shares(1 / (1 + self._of(self.performance, tasks).nan_to_num(nan=0.0)), len(tasks))


class DynamicTaskPrioritization(_ByPerformance):
    """Hard tasks first: w_k = -(1 - m_k)^gamma log m_k for the running mean m_k of a task's key performance indicator.

    Guo et al., "Dynamic Task Prioritization for Multitask Learning" (ECCV 2018). Until its indicator
    is known a task has weight 1.

    Args:
        num_tasks: n.
        gamma: the larger, the more a task that does well is left aside.
        decay: of the running mean, from 0 (the last indicator alone) to 1.

    Raises:
        ValueError: an argument is outside of its range.

    State: n numbers. Feedback: `update(metrics=...)` with indicators in (0, 1], accuracies for instance.
    """

    paper = "Guo et al., ECCV 2018"
    gamma = Real(0)

    def __init__(self, num_tasks: int, gamma: float = 1.0, decay: float = 0.9) -> None:
        """See the class."""
        super().__init__(num_tasks, decay)
        self.gamma = gamma

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The focal loss of the indicators."""
        mean = self._of(self.performance, tasks)
        focal = -((1 - mean) ** self.gamma) * mean.log()
        return torch.where(mean.isnan(), torch.ones_like(mean), focal)
