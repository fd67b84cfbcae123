"""Scalarizations: functions of the vector of losses that are differentiated as a whole."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._settings import Real
from mtlfast._vectors import Vector, vector
from mtlfast.weighting._base import LossWeighting, NeedsPositiveLosses


class GeometricMean(NeedsPositiveLosses):
    """The geometric mean of the losses, exp(mean_k log L_k), which weighs each loss by the inverse of its size.

    It is computed from the sum of the logarithms, so that no product overflows. Chennupati et al., "MultiNet++:
    Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning" (CVPR Workshops 2019).

    Raises:
        ValueError: on the CPU, a loss is not positive, where the mean has no derivative, or is so much smaller than the
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
        """The preferences [n], float64; None if there are none."""
        return self.preferences

    @weights.setter
    def weights(self, value: Vector | None) -> None:
        self.preferences = self._vector("weights", value, self.preferences, not_all_zero=self._divides)

    @property
    def reference(self) -> Tensor | None:
        """The reference point [n], float64; None if there is none."""
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
        """The present tasks' preferences; 1/K each if the user gave none."""
        if self.preferences is None:
            return torch.full_like(values.detach(), 1 / len(values))
        return self._of(self.preferences, tasks).to(values.dtype)


class Tchebycheff(_HasPreferences):
    """The largest weighted loss, max_k w_k (L_k - z_k), so that only the worst task is trained at each step.

    Bowman, "On the Relationship of the Tchebycheff Norm and the Efficient Frontier of Multiple-Criteria Objectives"
    (1976).

    Args:
        weights: [n], w. None: 1/K each.
        reference: [n], z, a lower bound of the losses. None: 0.

    Raises:
        ValueError: an entry of a vector is not finite; at a call, there are more tasks than entries.
    """

    paper = "Bowman, 1976"

    def __init__(self, weights: Vector | None = None, reference: Vector | None = None) -> None:
        super().__init__(weights, reference)

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        return cls()

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The largest term. If several are largest, its gradient is the mean of theirs."""
        return (self._preferred(values, tasks) * self._shifted(values, tasks)).amax()


class STCH(_HasPreferences):
    """A smooth maximum of the weighted losses: mu log sum_k exp(w_k (L_k - z_k) / mu).

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization" (ICML 2024). Also called
    `SmoothTchebycheff`.

    Args:
        mu: a smaller value brings the result nearer to the maximum.
        weights: [n], w. None: 1/K each.
        reference: [n], z, a lower bound of the losses. None: 0.

    Raises:
        ValueError: `mu` is not positive, or an entry of a vector is not finite; at a call, there are more tasks than
            entries.
    """

    paper = "Lin et al., ICML 2024"
    mu = Real(0, least_itself=False)

    def __init__(self, mu: float, weights: Vector | None = None, reference: Vector | None = None) -> None:
        super().__init__(weights, reference)
        self.mu = mu

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """STCH with mu = 0.1 and equal preferences."""
        return cls(mu=0.1)

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The smooth maximum. The largest term is subtracted first, so that no exponential overflows."""
        terms = self._preferred(values, tasks) * self._shifted(values, tasks)
        largest = terms.detach().amax()
        mu = max(self.mu, torch.finfo(terms.dtype).tiny)
        return mu * torch.logsumexp((terms - largest) / mu, dim=0) + largest


class PBI(_HasPreferences):
    """Penalised boundary intersection: d_1 + theta d_2, a distance along a preferred direction and one away from it.

    The direction is v = w / |w|. The distances are d_1 = (L - z) . v and d_2 = |L - z - d_1 v|. Zhang and Li, "MOEA/D:
    A Multiobjective Evolutionary Algorithm Based on Decomposition" (2007).

    The method gives a loss that is too small for the direction a negative weight. d_1 is 0 if no present task has a
    preference other than 0. 1e-12 is added under d_2's root, which keeps the gradient finite on the direction itself.

    Args:
        theta: the penalty of the distance d_2.
        weights: [n], w.
        reference: [n], z, a lower bound of the losses. None: 0.

    Raises:
        ValueError: `theta` is negative, an entry of a vector is not finite, or `weights` are all 0; at a call, there
            are more tasks than entries.
    """

    paper = "Zhang and Li, 2007"
    theta = Real(0)
    _divides = True

    def __init__(self, theta: float, weights: Vector, reference: Vector | None = None) -> None:
        super().__init__(weights, reference)
        self.theta = theta

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """PBI with theta = 1 and equal preferences."""
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

    Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning" (ICDM 2021). In the
    paper the network reads the preference as well; that part is up to the user.

    The method may give a task that is ahead of its preference a negative weight. If the norm of the losses is at most
    1e-8 (in float16 2 lambda / 65504), where the cosine has no derivative, the weights are w alone.

    Args:
        lambda_: the weight of the cosine.
        weights: [n], w.

    Raises:
        ValueError: `lambda_` is negative, or an entry of `weights` is not finite; at a call, there are more tasks than
            entries.
    """

    paper = "Ruchte and Grabocka, ICDM 2021"
    lambda_ = Real(0)

    def __init__(self, lambda_: float, weights: Vector) -> None:
        super().__init__(weights, None)
        self.lambda_ = lambda_

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """COSMOS with lambda = 1 and equal preferences."""
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
    """The largest absolute value, if the values' squares overflow or, with `of_small`, are near 0; otherwise 1."""
    largest = values.detach().abs().amax()
    precision = torch.finfo(values.dtype)
    beyond = largest > precision.max**0.5 * 1e-3
    if of_small:
        beyond = beyond | ((largest < 1e-8) & (largest > 0))
    return torch.where(beyond, largest, 1.0)
