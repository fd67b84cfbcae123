"""Loss weightings whose weights follow the tasks' performance."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.weighting._base import Weighted, readable, shares
from mtlfast.weighting._losses import Feedback


class _ByPerformance(Weighted):
    """A method that keeps the running mean of the tasks' metrics, which `update` gives it."""

    keeps = "n metrics"
    takes: str  # which metrics the method takes, for an error
    decay = Real(0, 1, most_itself=False)
    performance: Tensor
    refused: Tensor
    out_of_range: Tensor

    def __init__(self, num_tasks: int, decay: float) -> None:
        super().__init__(num_tasks)
        self.decay = decay
        self._keep_state("performance", fill=torch.nan)
        # On a GPU these note whose last metric was out of range, and how many metrics were.
        self.register_buffer("refused", torch.zeros(self._known_tasks(), dtype=torch.bool), persistent=False)
        self._keep_count("out_of_range", persistent=False)

    @abstractmethod
    def _in_range(self, metrics: Tensor) -> Tensor:
        """Whether the method takes each metric. The answer for NaN does not matter."""

    @abstractmethod
    def _weights_of(self, performance: Tensor) -> Tensor:
        """The weights of tasks with these running means. A mean is NaN if no metric is known."""

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The weights of the running means; NaN for a task whose last metric was out of range."""
        weights = self._weights_of(self._of(self.performance, tasks))
        return torch.where(self._of(self.refused, tasks), torch.nan, weights)

    @torch.no_grad()
    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Takes the tasks' metrics, of which larger is better. None stands for a task without a new metric.

        Raises:
            ValueError: `metrics` is None; on the CPU, a metric is out of the method's range. On a GPU the task's weight
                is NaN then until its next metric, and `diagnostics()` counts it.
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
        """The number of metrics that were out of range."""
        return {"out_of_range": int(self.out_of_range)}


class InversePerformance(_ByPerformance):
    """Gives tasks that perform worse a larger weight: w_k = 1 / (1 + m_k), scaled to add up to K.

    m_k is the running mean of task k's metric, and 0 until a metric is known.

    Args:
        num_tasks: n, the number of tasks.
        decay: the decay of the running mean. With 0 it is the last metric.

    Raises:
        ValueError: `decay` is outside of its range.

    State: n numbers. Feedback: call `update(metrics=...)` with metrics above -1, of which larger is better.
    """

    takes = "a number above -1"

    def __init__(self, num_tasks: int, decay: float = 0.0) -> None:
        super().__init__(num_tasks, decay)

    def _in_range(self, metrics: Tensor) -> Tensor:
        return metrics > -1

    def _weights_of(self, performance: Tensor) -> Tensor:
        return shares(1 / (1 + performance.nan_to_num(nan=0.0)), len(performance))


class DynamicTaskPrioritization(_ByPerformance):
    """Gives hard tasks a larger weight: w_k = -(1 - m_k)^gamma log m_k, where m_k is the running mean of a metric.

    A task has the weight 1 until its metric is known. Guo et al., "Dynamic Task Prioritization for Multitask Learning"
    (ECCV 2018).

    Args:
        num_tasks: n, the number of tasks.
        gamma: a larger value gives tasks that perform well a smaller weight.
        decay: the decay of the running mean. With 0 it is the last metric.

    Raises:
        ValueError: an argument is outside of its range.

    State: n numbers. Feedback: call `update(metrics=...)` with metrics from 0 to 1, such as accuracies. A mean below
    1e-8 counts as 1e-8.
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
