"""Weights that no loss changes."""

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
    """The sum of the present tasks' losses; also called `Equal`."""

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
    """Fixed weights: sum_k w_k L_k.

    Args:
        weights: [n], one for each task, a tensor or a list.

    Raises:
        ValueError: `weights` are no n finite numbers.
    """

    def __init__(self, weights: Tensor | Sequence[float]) -> None:
        super().__init__("weights", weights)

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """With weights from 0.5 to 1.5."""
        return cls(torch.linspace(0.5, 1.5, num_tasks))

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Theirs; an absent task's goes unused."""
        return self._of(self.task_weights, tasks)


class _BySampleSize(_OfEachTask):
    def __init__(self, sample_sizes: Tensor | Sequence[float]) -> None:
        super().__init__("sample_sizes", sample_sizes, least=1)


class InverseSampleSize(_BySampleSize):
    """Tasks with less data weigh more: w_k = n_k^-beta, times what makes the present tasks' add up to K.

    Args:
        sample_sizes: [n] the tasks' numbers of samples, a tensor or a list.
        beta: 0: all the same; 1: every sample of a task that is drawn as often as it is large counts for its task.

    Raises:
        ValueError: a size is below 1 or not finite, or `beta` is negative.
    """

    beta = Real(0)

    def __init__(self, sample_sizes: Tensor | Sequence[float], beta: float = 1.0) -> None:
        super().__init__(sample_sizes)
        self.beta = beta

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """With 100 to 400 samples."""
        return cls(torch.linspace(100, 400, num_tasks))

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """They add up to K."""
        sizes = self._of(self.task_weights, tasks)
        # Over the smallest, so that not all of them vanish at a large beta.
        return shares((sizes / sizes.amin()) ** -self.beta, len(tasks))


class ClassBalanced(_BySampleSize):
    """Weights by the effective number of samples: w_k = (1 - beta) / (1 - beta^n_k), scaled to add up to K.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019), with tasks in the place of
    classes.

    Args:
        sample_sizes: [n] the tasks' numbers of samples, a tensor or a list.
        beta: 0: all the same; towards 1: the inverse sample size.

    Raises:
        ValueError: a size is below 1 or not finite, or `beta` not in [0, 1).
    """

    paper = "Cui et al., CVPR 2019"
    beta = Real(0, 1, most_itself=False)

    def __init__(self, sample_sizes: Tensor | Sequence[float], beta: float = 0.9999) -> None:
        super().__init__(sample_sizes)
        self.beta = beta

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """With 100 to 400 samples."""
        return cls(torch.linspace(100, 400, num_tasks), beta=0.99)

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """They add up to K."""
        sizes = self._of(self.task_weights, tasks)
        # 1 - beta^n without the cancellation that 1 - beta near 0 would bring.
        effective = -torch.expm1(sizes * math.log(self.beta)) if self.beta > 0 else torch.ones_like(sizes)
        return shares((1 - self.beta) / effective, len(tasks))
