"""Loss weightings with parameters that an optimizer learns. Give it these beside the model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtlfast._numbers import plain, shown
from mtlfast.weighting._base import LossWeighting


class UW(LossWeighting):
    """Weighs tasks by their learned uncertainty: sum_k 1/2 exp(-s_k) L_k + 1/2 s_k with s_k = log sigma_k^2.

    The term of a classification task is exp(-s_k) L_k + 1/2 s_k. Kendall et al., "Multi-Task Learning Using Uncertainty
    to Weigh Losses for Scene Geometry and Semantics" (CVPR 2018). Also called `UncertaintyWeighting`.

    Args:
        num_tasks: n, the number of tasks.
        classification: [n], True for each task whose loss is a cross entropy. None: no task, as in
            torchjd.scalarization.

    Raises:
        ValueError: `classification` does not have n entries, or one is neither True nor False.

    Parameter: `log_var` [n], the s_k, which start at 0. Give it to the optimizer.

    Example:
        >>> import torch
        >>> from mtlfast.weighting import UW
        >>> weighting = UW(num_tasks=2)
        >>> optimizer = torch.optim.SGD(weighting.parameters(), lr=1.0)  # and the model's parameters
        >>> loss = weighting([torch.tensor(1.0), torch.tensor(3.0)])
        >>> loss
        tensor(2., grad_fn=<SumBackward0>)
        >>> loss.backward()
        >>> optimizer.step()
        >>> weighting.log_var  # the larger loss gets the larger uncertainty
        Parameter containing:
        tensor([0., 1.], requires_grad=True)
    """

    paper = "Kendall et al., CVPR 2018"
    keeps = "n parameters"
    factors: Tensor

    def __init__(self, num_tasks: int, classification: Sequence[bool] | None = None) -> None:
        super().__init__(num_tasks)
        n = self._known_tasks()
        kinds = [False] * n if classification is None else [plain(kind) for kind in classification]
        if len(kinds) != n:
            raise ValueError(f"UW: classification has {len(kinds)} entries, expected {n} as num_tasks says")
        if any(kind not in (False, True) for kind in kinds):
            raise ValueError(f"UW: classification is {shown(classification)}, expected {n} of True and False")
        self.log_var = nn.Parameter(torch.zeros(n))
        self.register_buffer("factors", torch.tensor([1.0 if kind else 0.5 for kind in kinds], dtype=torch.float64))

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        log_var = self._of(self.log_var, tasks)
        factors = self._of(self.factors, tasks).to(values.dtype)
        return (factors * torch.exp(-log_var) * values + 0.5 * log_var).sum()

    def reset(self) -> None:
        """Sets the parameters to 0."""
        nn.init.zeros_(self.log_var)


class IMTLL(LossWeighting):
    """Learns scales that bring all losses to one size: sum_k exp(s_k) L_k - s_k.

    Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021).

    Args:
        num_tasks: n, the number of tasks.

    Parameter: `log_scale` [n], the s_k, which start at 0. Give it to the optimizer.
    """

    paper = "Liu et al., ICLR 2021"
    keeps = "n parameters"

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.log_scale = nn.Parameter(torch.zeros(self._known_tasks()))

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        log_scale = self._of(self.log_scale, tasks)
        return (torch.exp(log_scale) * values - log_scale).sum()

    def reset(self) -> None:
        """Sets the parameters to 0."""
        nn.init.zeros_(self.log_scale)
