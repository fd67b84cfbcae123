"""Scalarizations: one number from the vector of losses, differentiated through."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.weighting._base import LossWeighting, OfPositive


class GeometricMean(OfPositive):
    """The geometric mean of the losses, exp(mean_k log L_k): each weighs by the inverse of its own size.

    Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning" (CVPR Workshops 2019). The product is taken as a sum of logarithms, so it cannot overflow.

    Raises:
        ValueError: on the CPU, a loss is not positive.
    """

    paper = "Chennupati et al., CVPRW 2019"

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """That of the present tasks."""
        return values.log().mean().exp()


class _Preferring(LossWeighting):
    """A method with a preference for each task, and a point that losses are measured from."""

    preferences: Tensor | None
    origin: Tensor | None

    def __init__(self, weights: Tensor | None, reference: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("preferences", None)
        self.register_buffer("origin", None)
        self.weights, self.reference = weights, reference

    @property
    def weights(self) -> Tensor | None:
        """The preferences [n], float64, or None."""
        return self.preferences

    @weights.setter
    def weights(self, value: Tensor | None) -> None:
        self.preferences = self._vector("weights", value)

    @property
    def reference(self) -> Tensor | None:
        """The point [n], float64, or None."""
        return self.origin

    @reference.setter
    def reference(self, value: Tensor | None) -> None:
        self.origin = self._vector("reference", value)

    def _vector(self, name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if value.dim() != 1:
            raise ValueError(f"{type(self).__name__}: {name} has shape {list(value.shape)}, expected [n]")
        if self.num_tasks is not None and len(value) != self.num_tasks:
            raise ValueError(
                f"{type(self).__name__}: {name} has {len(value)} entries, expected {self.num_tasks} as for the others"
            )
        self.num_tasks = len(value)
        return value.detach().double().clone()

    def _shifted(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return values if self.origin is None else values - self._of(self.origin, tasks).to(values.dtype)

    def _preferred(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The present tasks' preferences; 1/K each where there are none."""
        if self.preferences is None:
            return torch.full_like(values.detach(), 1 / len(values))
        return self._of(self.preferences, tasks).to(values.dtype)


class Tchebycheff(_Preferring):
    """The worst task alone: max_k w_k (L_k - z_k).

    Bowman, "On the Relationship of the Tchebycheff Norm and the Efficient Frontier of Multiple-Criteria Objectives"
    (1976).

    Args:
        weights: [n] w; None: 1/K each.
        reference: [n] z, a lower bound of the losses; None: 0.

    Raises:
        ValueError: one of them has not one dimension; at a call, there are more tasks than entries.
    """

    paper = "Bowman, 1976"

    def __init__(self, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """See the class."""
        super().__init__(weights, reference)

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The largest term; where several are, their gradients' mean counts."""
        return (self._preferred(values, tasks) * self._shifted(values, tasks)).amax()


class STCH(_Preferring):
    """The worst task, smoothly: mu log sum_k exp(w_k (L_k - z_k) / mu).

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization" (ICML 2024). Also called
    `SmoothTchebycheff`.

    Args:
        mu: the smaller, the nearer to the maximum.
        weights: [n] w; None: 1/K each.
        reference: [n] z, a lower bound of the losses; None: 0.

    Raises:
        ValueError: `mu` is not positive, a vector has not one dimension; at a call, there are more tasks than entries.
    """

    paper = "Lin et al., ICML 2024"
    mu = Real(0, least_itself=False)

    def __init__(self, mu: float, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        """See the class."""
        super().__init__(weights, reference)
        self.mu = mu

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The smooth maximum; torch's logsumexp takes the largest off first, so it cannot overflow."""
        terms = self._preferred(values, tasks) * self._shifted(values, tasks)
        largest = terms.detach().amax()
        return self.mu * torch.logsumexp((terms - largest) / self.mu, dim=0) + largest


class PBI(_Preferring):
    """Penalised boundary intersection: d_1 + theta d_2, along a preferred direction and away from it.

    With the direction v = w / |w|: d_1 = (L - z) v, d_2 = |L - z - d_1 v|. Zhang and Li, "MOEA/D: A Multiobjective
    Evolutionary Algorithm Based on Decomposition" (2007).

    Args:
        theta: the penalty.
        weights: [n] w.
        reference: [n] z, a lower bound of the losses; None: 0.

    Raises:
        ValueError: `theta` is negative, a vector has not one dimension; at a call, there are more tasks than entries.

    1e-12 under d_2's root keeps its gradient finite on the direction.
    """

    paper = "Zhang and Li, 2007"
    theta = Real(0)

    def __init__(self, theta: float, weights: Tensor, reference: Tensor | None = None) -> None:
        """See the class."""
        super().__init__(weights, reference)
        self.theta = theta

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Of the present tasks' coordinates."""
        direction = self._preferred(values, tasks)
        direction = direction / direction.norm()
        shifted = self._shifted(values, tasks)
        along = (shifted * direction).sum()
        away = shifted - along * direction
        penalised: Tensor = along + self.theta * (away.square().sum() + 1e-12).sqrt()
        return penalised


class COSMOS(_Preferring):
    """A weighted sum that also turns the losses towards the preference: sum_k w_k L_k - lambda cos(w, L).

    Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning" (ICDM 2021).
    The network that also reads the preference is the user's.

    Args:
        lambda_: the weight of the cosine.
        weights: [n] w.

    Raises:
        ValueError: `lambda_` is negative, `weights` has not one dimension; at a call, there are more tasks than in it.
    """

    paper = "Ruchte and Grabocka, ICDM 2021"
    lambda_ = Real(0)

    def __init__(self, lambda_: float, weights: Tensor) -> None:
        """See the class."""
        super().__init__(weights, None)
        self.lambda_ = lambda_

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """Of the present tasks' coordinates."""
        preferred = self._preferred(values, tasks)
        cosine = torch.nn.functional.cosine_similarity(preferred, values, dim=0)
        return (preferred * values).sum() - self.lambda_ * cosine
