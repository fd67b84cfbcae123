"""The result of `mtlfast.backward`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtlfast.jacobian import Plan

STORED = Plan("stored")


@dataclass(frozen=True)
class StepResult:
    """What one call of `mtlfast.backward` computed. K is the number of tasks whose loss was not None.

    The tensors stay on the gradients' device, and reading one on the host waits for the device.

    Attributes:
        losses: [K] the losses as they were given, so they include `loss_scale`; detached.
        tasks: the indices of the K tasks among all losses that were given.
        weights: [K] float64, the weight of each task's gradient in the shared update. None if the method is not a
            weighted sum of the task gradients.
        loss_weights: [K] the factor by which the weighting multiplied each loss; None without a weighting.
        gram: [K, K] float64, the dot products of the task gradients of the shared parameters. None if the method did
            not need them and `diagnostics` was False.
        names: the K tasks' names, if the losses came as a dict; otherwise None.
        groups: the names of the G groups of parameters, if the step had any. `weights`, `norms` are then [G, K], and
            `gram`, `cosines` [G, K, K]; `by_group` has those of each group by its name.
        plan: how the task gradients were computed. `print(plan)` shows it; `plan.way` is one of these. "stored": one
            backward pass for each task through one graph. "implicit": without the gradients of the layers that
            `plan.layers` says it of. "mixing": one backward pass for mixtures of samples. "closures": a forward and a
            backward pass for each task. "accumulated": over micro-batches. "features": at features, with one backward
            pass below them. "two batches": with `second`; `losses` are then the means of both batches, and `gram` is
            that of the mean of their gradients.

    Example:
        >>> import torch, mtlfast
        >>> from mtlfast.aggregation import PCGrad
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> step = mtlfast.backward({"depth": 3 * w[0], "edges": None, "normals": 4 * w[1]}, PCGrad(), shared=[w])
        >>> step.tasks, step.names
        ((0, 2), ('depth', 'normals'))
        >>> step.norms
        tensor([3., 4.], dtype=torch.float64)
        >>> step.cosines
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """

    losses: Tensor
    tasks: tuple[int, ...]
    weights: Tensor | None
    gram: Tensor | None
    loss_weights: Tensor | None = None
    names: tuple[str, ...] | None = None
    plan: Plan = STORED
    groups: tuple[str, ...] | None = None

    @property
    def norms(self) -> Tensor | None:
        """[K] float64, the norm of each task's gradient; None if `gram` is, even if a method reads norms alone."""
        return None if self.gram is None else self.gram.diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def cosines(self) -> Tensor | None:
        """[K, K] float64, the cosines between task gradients, NaN for a zero gradient; None if `gram` is None."""
        norms = self.norms
        if self.gram is None or norms is None:
            return None
        return self.gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2))

    @property
    def alignment(self) -> Tensor | None:
        """How well the gradients agree: 2 |mean of the unit gradients|^2 - 1, a number or [G]; None if `gram` is None.

        It is 1 if all point the same way, and -1 if the unit gradients cancel. A task whose gradient is zero does not
        count. NaN if all are zero, as where no task reaches a group, or if one is not finite. arXiv 2502.00604.
        """
        norms = self.norms
        if self.gram is None or norms is None:
            return None
        inverse = torch.where(norms == 0, 0, 1 / norms)
        squares = (self.gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).sum(dim=(-2, -1))
        return 2 * squares / (norms != 0).sum(dim=-1).square() - 1

    @property
    def by_group(self) -> dict[str, StepResult]:
        """The result of each group of parameters, as of a step with that group alone; empty without groups."""
        return {
            name: replace(
                self,
                groups=None,
                weights=None if self.weights is None else self.weights[i],
                gram=None if self.gram is None else self.gram[i],
            )
            for i, name in enumerate(self.groups or ())
        }
