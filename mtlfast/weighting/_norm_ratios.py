"""Loss weightings that are ratios of the norms of task gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._settings import Choice, Real, Whole
from mtlfast.weighting._norms import FollowsNorms, Layers


class InverseNormLoss(FollowsNorms):
    """Gives each loss the inverse of its gradient's norm as its weight: w_k = c / m_k, which add up to K.

    m_k is the running mean of ||g_k||. With `decay=0` all weighted gradients of the shared parameters have one length,
    as under the aggregator `InverseNorm`; here the heads see the weighted losses too. A task has the weight 1 until it
    has a norm above 0. A norm of 0 leaves the mean as it was.

    Args:
        num_tasks: n, the number of tasks.
        decay: the decay of the running means. With 0 they are the last norms.
        layers: the shared parameters of whose gradients the norms are taken: a module, a parameter or a list of
            parameters. None: all shared parameters.

    Raises:
        ValueError: an argument is outside of its range.

    State: n numbers. Pass it to `mtlfast.backward(..., weighting=)`, which computes the norms. Without that, call
    `update(norms=)`.
    """

    keeps = "n norms"

    def __init__(self, num_tasks: int, decay: float = 0.9, layers: Layers | None = None) -> None:
        super().__init__(num_tasks, decay, layers)

    def _numbers_of(self, norms: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return torch.where(norms > 0, norms, torch.nan)

    def _weights_of(self, means: Tensor, tasks: tuple[int, ...]) -> Tensor:
        known = ~means.isnan()
        least = torch.where(known, means, torch.inf).amin()
        inverse = torch.where(known, least / means, 0.0)  # relative to the least mean, so that nothing overflows
        return torch.where(known, known.sum() * inverse / inverse.sum(), 1.0)


class LRAnnealing(FollowsNorms):
    """Brings all gradients to the size of one task's: w_k is the running mean of ||g_ref|| / ||g_k||, from 1.

    Norms are sums of absolute values, so that the ratio is that of the mean absolute values of two gradients. Wang et
    al., "Understanding and Mitigating Gradient Pathologies in Physics-Informed Neural Networks" (2020), take the
    largest absolute value of the reference in place of the mean; this is the form of Jin et al., "NSFnets" (2021), and
    of NVIDIA PhysicsNeMo. A norm of 0, of the task or of the reference, leaves the weight as it was.

    Args:
        num_tasks: n, the number of tasks.
        reference: the index of the task whose weight is 1, such as the residual of the equation.
        decay: how much of the old weights a step keeps: 1 minus the alpha of PhysicsNeMo.
        norm_order: 1 for sums of absolute values, 2 for Euclidean norms.
        layers: the shared parameters of whose gradients the norms are taken: a module, a parameter or a list of
            parameters. None: all shared parameters.

    Raises:
        ValueError: an argument is outside of its range.

    State: n numbers. Pass it to `mtlfast.backward(..., weighting=)`, which computes the norms. Without that, call
    `update(norms=)`.
    """

    paper = "Wang et al., 2020"
    keeps = "n weights"
    reference = Whole(0)
    norm_order = Choice(1, 2)

    def __init__(
        self,
        num_tasks: int,
        reference: int = 0,
        decay: float = 0.99,
        norm_order: int = 1,
        layers: Layers | None = None,
    ) -> None:
        super().__init__(num_tasks, decay, layers, first=1.0)
        self.reference = reference
        self.norm_order = norm_order
        if self.reference >= self._known_tasks():
            raise ValueError(f"LRAnnealing: reference is {reference}, expected one of {num_tasks}")

    def _numbers_of(self, norms: Tensor, tasks: tuple[int, ...]) -> Tensor:
        if self.reference not in tasks:
            return torch.full_like(norms, torch.nan)
        ratios = norms[tasks.index(self.reference)] / norms
        return torch.where(ratios > 0, ratios, torch.nan)

    def _weights_of(self, means: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return means


class AdaptiveWeight(FollowsNorms):
    """Brings one loss's gradient to the length of another's: the weight of an adversarial loss in VQGAN-like training.

    The task's weight is factor * min(||g_ref|| / (||g_task|| + eps ||g_ref||), max_weight), and 0 before `start`. All
    other losses have the weight 1. Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (CVPR 2021),
    whose code adds eps itself: the same where ||g_ref|| is 1. Until the task has a norm the ratio is 1. In a step in
    which one of the two tasks is absent the weight is the last one.

    Args:
        num_tasks: n, the number of tasks.
        reference: the index of the task with the gradient to compare with, such as the reconstruction.
        task: the index of the task that is weighed, such as the adversarial loss of the generator.
        factor: multiplies the weight.
        max_weight: the most that the ratio may be.
        eps: keeps the ratio finite, relative to the reference's norm, so that it is at most 1 / eps.
        start: the first training step in which the task counts, from 0.
        decay: the decay of a running mean of the ratio. With 0, as in the paper, it is the last ratio.
        layers: the shared parameters of whose gradients the norms are taken: the last layer of the decoder in VQGAN. A
            module, a parameter or a list of parameters. None: all shared parameters.

    Raises:
        ValueError: an argument is outside of its range.

    State: n + 1 numbers. Pass it to `mtlfast.backward(..., weighting=)`, which computes the norms. Without that, call
    `update(norms=)`. With the aggregator `Sum` a step is that of VQGAN.
    """

    paper = "Esser et al., CVPR 2021"
    keeps = "n ratios and the time"
    reference = Whole(0)
    task = Whole(0)
    factor = Real(0)
    max_weight = Real(0)
    eps = Real(0, 1, least_itself=False)
    start = Whole(0)
    time: Tensor

    def __init__(
        self,
        num_tasks: int = 2,
        reference: int = 0,
        task: int = 1,
        factor: float = 1.0,
        max_weight: float = 1e4,
        eps: float = 1e-4,
        start: int = 0,
        decay: float = 0.0,
        layers: Layers | None = None,
    ) -> None:
        super().__init__(num_tasks, decay, layers)
        self.reference = reference
        self.task = task
        self.factor = factor
        self.max_weight = max_weight
        self.eps = eps
        self.start = start
        for name, index in (("reference", self.reference), ("task", self.task)):
            if index >= self._known_tasks():
                raise ValueError(f"AdaptiveWeight: {name} is {index}, expected one of {num_tasks}")
        if self.reference == self.task and self._known_tasks() > 1:
            raise ValueError(f"AdaptiveWeight: task is {task}, expected another one than the reference")
        self._keep_count("time")

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """The second task is weighed by the first; one task by itself."""
        return cls(num_tasks, task=min(1, num_tasks - 1))

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        weights = super().weights(values, tasks)
        self._move(self.time, None, self.time + 1)
        return weights

    def _numbers_of(self, norms: Tensor, tasks: tuple[int, ...]) -> Tensor:
        numbers = torch.full_like(norms, torch.nan)
        if self.reference in tasks and self.task in tasks:
            k = tasks.index(self.task)
            aim = norms[tasks.index(self.reference)]
            numbers[k] = (aim / (norms[k] + self.eps * aim)).clamp(max=self.max_weight)
        return numbers

    def _weights_of(self, means: Tensor, tasks: tuple[int, ...]) -> Tensor:
        weights = means.nan_to_num(nan=1.0)
        if self.task in tasks:
            k = tasks.index(self.task)
            weights[k] = torch.where(self.time >= self.start, self.factor * weights[k].clamp(max=self.max_weight), 0.0)
        return weights

    def reset(self) -> None:
        super().reset()
        self.time.zero_()
