"""Loss weightings whose weights do not depend on the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._settings import Real
from mtlfast._vectors import vector
from mtlfast.weighting._base import LossWeighting, Weighted, shares


class Sum(LossWeighting):
    """The sum of the present tasks' losses. Also called `Equal`."""

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return values.sum()


class Mean(LossWeighting):
    """The mean of the present tasks' losses."""

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return values.mean()


class _OfEachTask(Weighted):
    """A method with a fixed number for each task."""

    task_weights: Tensor

    def __init__(self, what: str, numbers: Tensor | Sequence[float], least: float = -math.inf) -> None:
        given = vector(self, what, numbers, least=least)
        super().__init__(len(given))
        self.register_buffer("task_weights", given)


class Constant(_OfEachTask):
    """The sum of the losses with weights that the user gives, sum_k w_k L_k. An absent task's weight is not used.

    Args:
        weights: [n], one number for each task, as a tensor or a list.

    Raises:
        ValueError: `weights` is not a vector of finite numbers.
    """

    def __init__(self, weights: Tensor | Sequence[float]) -> None:
        super().__init__("weights", weights)

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """Weights from 0.5 to 1.5."""
        return cls(torch.linspace(0.5, 1.5, num_tasks))

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return self._of(self.task_weights, tasks)


class _BySampleSize(_OfEachTask):
    def __init__(self, sample_sizes: Tensor | Sequence[float]) -> None:
        super().__init__("sample_sizes", sample_sizes, least=1)


class InverseSampleSize(_BySampleSize):
    """Gives tasks with less data a larger weight: w_k = n_k^-beta, scaled so that the present tasks' add up to K.

    Args:
        sample_sizes: [n], the numbers of samples n_k, as a tensor or a list.
        beta: 0 gives equal weights. 1 gives tasks that are sampled in proportion to their size the same total weight.

    Raises:
        ValueError: a size is below 1 or not finite, or `beta` is negative.
    """

    beta = Real(0)

    def __init__(self, sample_sizes: Tensor | Sequence[float], beta: float = 1.0) -> None:
        super().__init__(sample_sizes)
        self.beta = beta

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """Tasks with 100 to 400 samples."""
        return cls(torch.linspace(100, 400, num_tasks))

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        sizes = self._of(self.task_weights, tasks)
        # Dividing by the smallest keeps the weights from all becoming 0 at a large beta.
        return shares((sizes / sizes.amin()) ** -self.beta, len(tasks))


class ClassBalanced(_BySampleSize):
    """Weighs tasks by their effective number of samples: w_k = (1 - beta) / (1 - beta^n_k), scaled to add up to K.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019), with tasks instead of classes.

    Args:
        sample_sizes: [n], the numbers of samples n_k, as a tensor or a list.
        beta: 0 gives equal weights; near 1 a weight is nearly inverse to the number of samples.

    Raises:
        ValueError: a size is below 1 or not finite, or `beta` is not in [0, 1).
    """

    paper = "Cui et al., CVPR 2019"
    beta = Real(0, 1, most_itself=False)

    def __init__(self, sample_sizes: Tensor | Sequence[float], beta: float = 0.9999) -> None:
        super().__init__(sample_sizes)
        self.beta = beta

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """Tasks with 100 to 400 samples."""
        return cls(torch.linspace(100, 400, num_tasks), beta=0.99)

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        sizes = self._of(self.task_weights, tasks)
        # expm1 computes 1 - beta^n without cancellation where beta is near 1.
        effective = -torch.expm1(sizes * math.log(self.beta)) if self.beta > 0 else torch.ones_like(sizes)
        return shares((1 - self.beta) / effective, len(tasks))
