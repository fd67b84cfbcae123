"""DB-MTL."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.aggregation._keeps_state import Joint, KeepsState, Move, fits, new_gram
from mtlfast.aggregation._parameter_state import Places
from mtlfast.aggregation._step import Step, scale_on


class DBMTL(KeepsState):
    """Averages the gradients of the losses' logarithms over the steps, and scales the averages to the longest one.

    With task k's gradient g_k and loss L_k, the average b_k becomes x_k + beta t^-beta_sigma (b_k - x_k) with
    x_k = g_k / L_k, and the direction is the sum of max_j |b_j| / |b_k| b_k. t counts the task's steps. Lin et al.,
    "Dual-Balancing for Multi-Task Learning" (2023).

    Args:
        beta: how much of the average is kept at the first step, 0 to 1.
        beta_sigma: how fast beta falls. The paper has 0 or 0.5.
        state_dtype: the dtype of the averages. None: that of the gradients.

    Raises:
        ValueError: an argument is outside of its range; at a call, there are no losses.

    Losses must be positive: with another one the direction is NaN, unless its gradient is zero. LibMTL adds 1e-8 to
    losses and norms.

    State: an average for each task and parameter, and n float64 numbers. A step that is not finite changes nothing.
    Scale: the size of a loss does not matter. The direction is multiplied by `loss_scale`.
    Cost: two reads of gradients and averages, 4 K * P, one write of the averages and one of the direction, (K + 1) * P.
    """

    paper = "Lin et al., 2023"
    keeps = "n averages for each parameter and n numbers"
    tensors = "mean"
    size = 1  # the number of steps
    needs_losses = True
    beta = Real(0, 1)
    beta_sigma = Real(0)

    def __init__(self, beta: float = 0.9, beta_sigma: float = 0.0, state_dtype: torch.dtype | None = None) -> None:
        super().__init__(state_dtype)
        self.beta = beta
        self.beta_sigma = beta_sigma

    def move(self, joint: Joint, numbers: Tensor, step: Step, out: list[Tensor | None], places: Places) -> Move:
        gram, moving = joint.gram(step.precision), joint.moving
        assert step.losses is not None
        losses = step.losses.detach().to(gram.device, torch.float64)
        steps = numbers[0].nan_to_num(0.0) + 1
        kept = torch.where(moving, self.beta * steps**-self.beta_sigma, 1.0)
        silent = ~moving | (gram.diagonal()[: len(moving)] == 0)
        taken = (1 - kept) * torch.where(silent, 0.0, torch.where(losses > 0, 1 / losses, torch.nan))
        products = new_gram(gram, kept, taken)
        norms = products.diagonal().clamp(min=0).sqrt()
        longest = torch.where(moving, norms, 0.0).amax()
        scales = torch.where(moving & (norms > 0), longest / norms, 0.0)
        return Move(
            kept,
            taken,
            scales * scale_on(step, gram.device),
            None,
            torch.where(moving, steps, numbers[0]).unsqueeze(0),
            gram.isfinite().all() & fits(products, joint.state.dtype),
        )

    def extra_repr(self) -> str:
        return f"beta={self.beta}, beta_sigma={self.beta_sigma}, state_dtype={self.state_dtype}"
