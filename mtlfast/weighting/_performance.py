"""Weights from how well the tasks do."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.weighting._base import Weighted, readable, shares
from mtlfast.weighting._losses import Feedback


class _ByPerformance(Weighted):
    """A method that is told the tasks' performance, and keeps its running mean."""

    keeps = "n metrics"
    takes: str  # which metrics
    decay = Real(0, 1, most_itself=False)
    performance: Tensor
    refused: Tensor
    out_of_range: Tensor

    def __init__(self, num_tasks: int, decay: float) -> None:
        super().__init__(num_tasks)
        self.decay = decay
        self._keep_state("performance", fill=torch.nan)
        # On a GPU: whose last metric was out of range, and how many were.
        self.register_buffer("refused", torch.zeros(self._known_tasks(), dtype=torch.bool), persistent=False)
        self._keep_count("out_of_range", persistent=False)

    @abstractmethod
    def _in_range(self, metrics: Tensor) -> Tensor:
        """Which metrics the method takes; NaN passes."""

    @abstractmethod
    def _weights_of(self, performance: Tensor) -> Tensor:
        """The weights of tasks with these running means, NaN where there is none."""

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Those of the running means."""
        weights = self._weights_of(self._of(self.performance, tasks))
        return torch.where(self._of(self.refused, tasks), torch.nan, weights)

    @torch.no_grad()
    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Takes the tasks' metrics, larger being better; None for a task that has none this time.

        Raises:
            ValueError: there are no metrics; or one on the CPU is outside of what the method takes (elsewhere the
            task's weight is NaN until its next metric, and `diagnostics()` counts it).
        """
        if metrics is None:
            raise ValueError(f"{type(self).__name__}: metrics is None, expected the tasks' metrics")
        given, tasks = self._feedback("metrics", metrics)
        wrong = given.isfinite() & ~self._in_range(given)
        if readable(given) and bool(wrong.any()):  # host: CPU tensors
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"{type(self).__name__}: the metric of task {tasks[k]} is {float(given[k]):g}, expected {self.takes}"
            )
        new, wrong = given.to(self.performance), wrong.to(self.refused.device)
        old = self._of(self.performance, tasks)
        mean = torch.where(old.isnan(), new, self.decay * old + (1 - self.decay) * new)
        self._learn(self.performance, tasks, mean, when=new.isfinite() & ~wrong)
        self._learn(self.refused, tasks, wrong, when=new.isfinite())
        self.out_of_range += wrong.sum()

    def reset(self) -> None:
        self.performance.fill_(torch.nan)
        self.refused.zero_()
        self.out_of_range.zero_()

    def diagnostics(self) -> dict[str, int]:
        """How many metrics were out of range."""
        return {"out_of_range": int(self.out_of_range)}


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

    takes = "a number above -1"

    def __init__(self, num_tasks: int, decay: float = 0.0) -> None:
        super().__init__(num_tasks, decay)

    def _in_range(self, metrics: Tensor) -> Tensor:
        return metrics > -1

    def _weights_of(self, performance: Tensor) -> Tensor:
        return shares(1 / (1 + performance.nan_to_num(nan=0.0)), len(performance))


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

    State: n numbers. Feedback: `update(metrics=...)` with indicators from 0 to 1, accuracies for instance; a mean below
    1e-8 counts as that.
    """

    paper = "Guo et al., ECCV 2018"
    takes = "a share from 0 to 1"
    gamma = Real(0)

    def __init__(self, num_tasks: int, gamma: float = 1.0, decay: float = 0.9) -> None:
        super().__init__(num_tasks, decay)
        self.gamma = gamma

    def _in_range(self, metrics: Tensor) -> Tensor:
        return (metrics >= 0) & (metrics <= 1)

    def _weights_of(self, performance: Tensor) -> Tensor:
        mean = performance.clamp(1e-8, 1)
        focal = -((1 - mean) ** self.gamma) * mean.log()
        return torch.where(mean.isnan(), torch.ones_like(mean), focal)
