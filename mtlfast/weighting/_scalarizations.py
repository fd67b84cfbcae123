"""Scalarizations: one number from the vector of losses, differentiated through."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._settings import Real
from mtlfast._vectors import Vector, vector
from mtlfast.weighting._base import LossWeighting, NeedsPositiveLosses


class GeometricMean(NeedsPositiveLosses):
    """The geometric mean of the losses, exp(mean_k log L_k): each weighs by the inverse of its own size.

    Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning" (CVPR Workshops 2019). The product is taken as a sum of logarithms, so it cannot overflow.

    Raises:
        ValueError: on the CPU, a loss is not positive (at 0 the mean has no derivative), or so much smaller than the
            others that its weight is not finite.
    """

    paper = "Chennupati et al., CVPRW 2019"

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            weights = values.log().mean().exp() / (len(values) * values)
            one = self._one_if_finite(weights, values, tasks)
        return (values * one).log().mean().exp()


class _HasPreferences(LossWeighting):
    """A method with a preference for each task and a reference point that is subtracted from the losses."""

    preferences: Tensor | None
    origin: Tensor | None

    _divides = False  # does the method divide by the size of the preferences?

    def __init__(self, weights: Vector | None, reference: Vector | None) -> None:
        super().__init__()
        self.register_buffer("preferences", None)
        self.register_buffer("origin", None)
        self.weights, self.reference = weights, reference

    @property
    def weights(self) -> Tensor | None:
        """The preferences [n], float64, or None."""
        return self.preferences

    @weights.setter
    def weights(self, value: Vector | None) -> None:
        self.preferences = self._vector("weights", value, self.preferences, not_all_zero=self._divides)

    @property
    def reference(self) -> Tensor | None:
        """The point [n], float64, or None."""
        return self.origin

    @reference.setter
    def reference(self, value: Vector | None) -> None:
        self.origin = self._vector("reference", value, self.origin)

    def _vector(self, name: str, value: Vector | None, old: Tensor | None, not_all_zero: bool = False) -> Tensor | None:
        if value is None:
            return None
        new = vector(self, name, value, not_all_zero=not_all_zero)
        if self.num_tasks is not None and len(new) != self.num_tasks:
            raise ValueError(
                f"{type(self).__name__}: {name} has {len(new)} entries, expected {self.num_tasks} as for the others"
            )
        self.num_tasks = len(new)
        return new if old is None else new.to(old.device)

    def _shifted(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return values if self.origin is None else values - self._of(self.origin, tasks).to(values.dtype)

    def _preferred(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' preferences; 1/K each where there are none."""
        if self.preferences is None:
            return torch.full_like(values.detach(), 1 / len(values))
        return self._of(self.preferences, tasks).to(values.dtype)


class Tchebycheff(_HasPreferences):
    """The worst task alone: max_k w_k (L_k - z_k).

    Bowman, "On the Relationship of the Tchebycheff Norm and the Efficient Frontier of Multiple-Criteria Objectives"
    (1976).

    Args:
        weights: [n] w; None: 1/K each.
        reference: [n] z, a lower bound of the losses; None: 0.

    Raises:
        ValueError: one of them has an entry that is not finite; at a call, there are more tasks than entries.
    """

    paper = "Bowman, 1976"

    def __init__(self, weights: Vector | None = None, reference: Vector | None = None) -> None:
        super().__init__(weights, reference)

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        return cls()

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The largest term; where several are, their gradients' mean counts."""
        return (self._preferred(values, tasks) * self._shifted(values, tasks)).amax()


class STCH(_HasPreferences):
    """The worst task, smoothly: mu log sum_k exp(w_k (L_k - z_k) / mu).

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization" (ICML 2024). Also called
    `SmoothTchebycheff`.

    Args:
        mu: the smaller, the nearer to the maximum.
        weights: [n] w; None: 1/K each.
        reference: [n] z, a lower bound of the losses; None: 0.

    Raises:
        ValueError: `mu` is not positive, a vector has an entry that is not finite; at a call, there are more tasks than
            entries.
    """

    paper = "Lin et al., ICML 2024"
    mu = Real(0, least_itself=False)

    def __init__(self, mu: float, weights: Vector | None = None, reference: Vector | None = None) -> None:
        super().__init__(weights, reference)
        self.mu = mu

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """With mu = 0.1, without preferences."""
        return cls(mu=0.1)

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The smooth maximum; torch's logsumexp takes the largest off first, so it cannot overflow."""
        terms = self._preferred(values, tasks) * self._shifted(values, tasks)
        largest = terms.detach().amax()
        mu = max(self.mu, torch.finfo(terms.dtype).tiny)
        return mu * torch.logsumexp((terms - largest) / mu, dim=0) + largest


class PBI(_HasPreferences):
    """Penalised boundary intersection: d_1 + theta d_2, along a preferred direction and away from it.

    With the direction v = w / |w|: d_1 = (L - z) v, d_2 = |L - z - d_1 v|. Zhang and Li, "MOEA/D: A Multiobjective
    Evolutionary Algorithm Based on Decomposition" (2007).

    Args:
        theta: the penalty.
        weights: [n] w.
        reference: [n] z, a lower bound of the losses; None: 0.

    Raises:
        ValueError: `theta` is negative, a vector has an entry that is not finite, `weights` are all 0; at a call, there
            are more tasks than entries.

    1e-12 under d_2's root keeps its gradient finite on the direction. A loss that is too small for the direction has a
    negative weight, as the method wants it. Where no present task is preferred, d_1 is 0.
    """

    paper = "Zhang and Li, 2007"
    theta = Real(0)
    _divides = True

    def __init__(self, theta: float, weights: Vector, reference: Vector | None = None) -> None:
        super().__init__(weights, reference)
        self.theta = theta

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """With theta = 1, every task preferred alike."""
        return cls(theta=1.0, weights=torch.ones(num_tasks))

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        direction = self._preferred(values, tasks)
        direction = direction / unit(direction, of_small=True)
        direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
        shifted = self._shifted(values, tasks)
        along = (shifted * direction).sum()
        away = shifted - along * direction
        size = unit(away)
        least = (1e-12 / size / size).clamp(min=torch.finfo(away.dtype).tiny)
        penalised: Tensor = along + self.theta * size * ((away / size).square().sum() + least).sqrt()
        return penalised


class COSMOS(_HasPreferences):
    """A weighted sum that also turns the losses towards the preference: sum_k w_k L_k - lambda cos(w, L).

    Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning" (ICDM 2021).
    The network that also reads the preference is the user's. A task that is ahead of its preference may have a negative
    weight, as the method wants it. Losses of a norm up to 1e-8 (in float16 2 lambda / 65504) count as 0, where the
    cosine has no derivative: then the weights are w.

    Args:
        lambda_: the weight of the cosine.
        weights: [n] w.

    Raises:
        ValueError: `lambda_` is negative, one of `weights` is not finite; at a call, there are more tasks than in it.
    """

    paper = "Ruchte and Grabocka, ICDM 2021"
    lambda_ = Real(0)

    def __init__(self, lambda_: float, weights: Vector) -> None:
        super().__init__(weights, None)
        self.lambda_ = lambda_

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """With lambda = 1, every task preferred alike."""
        return cls(lambda_=1.0, weights=torch.ones(num_tasks))

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        preferred = self._preferred(values, tasks)
        size = unit(values)
        scaled = values / size
        cosine = torch.nn.functional.cosine_similarity(preferred / unit(preferred, of_small=True), scaled, dim=0)
        least = max(1e-8, 2 * self.lambda_ / self._largest_weight)
        cosine = torch.where(scaled.detach().norm() > least, cosine, cosine.detach())
        return size * (preferred * scaled).sum() - self.lambda_ * cosine


def unit(values: Tensor, of_small: bool = False) -> Tensor:
    """1; or the largest size, to divide by, where these values' squares overflow, or with `of_small` are near 0."""
    largest = values.detach().abs().amax()
    precision = torch.finfo(values.dtype)
    beyond = largest > precision.max**0.5 * 1e-3
    if of_small:
        beyond = beyond | ((largest < 1e-8) & (largest > 0))
    return torch.where(beyond, largest, 1.0)
