"""MoCo."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.aggregation._keeps_state import Joint, KeepsState, Move, fits, new_gram
from mtlfast.aggregation._parameter_state import Places
from mtlfast.aggregation._step import Step, scale_on


class MoCo(KeepsState):
    """Follows each task's gradient with a running average, and moves the tasks' weights by the averages' products.

    With task k's gradient g_k and loss L_k, the average y_k moves by beta t^-beta_sigma towards g_k L_k / |g_k|. Then
    the weights become softmax(w - gamma t^-gamma_sigma (Y Y^T + rho I) w), and the direction is Y^T w. t counts the
    task's steps, and w starts as 1/K. Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A
    Provably Convergent Approach" (ICLR 2023), in the form of its authors' code, which LibMTL has.

    Args:
        beta: the share of the average that is replaced at the first step, 0 to 1.
        beta_sigma: how fast beta falls.
        gamma: the step size of the weights.
        gamma_sigma: how fast gamma falls.
        rho: the weight decay.
        state_dtype: the dtype of the averages. None: that of the gradients.

    Raises:
        ValueError: an argument is outside of its range; at a call, there are no losses.

    State: an average for each task and parameter, and 2 n float64 numbers. A step that is not finite changes nothing.
    Scale: the averages are those of losses without `loss_scale`, and the direction is multiplied by it. The size of the
    gradients does not matter, and that of the losses does.
    Cost: two reads of gradients and averages, 4 K * P, one write of the averages and one of the direction,
    (K + 1) * P; the solve takes K^2 operations.
    """

    paper = "Fernando et al., ICLR 2023"
    keeps = "n averages for each parameter and 2 n numbers"
    tensors = "mean"
    size = 2  # the weight, and the number of steps
    needs_losses = True
    beta = Real(0, 1)
    beta_sigma = Real(0)
    gamma = Real(0)
    gamma_sigma = Real(0)
    rho = Real(0)

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype)
        self.beta = beta
        self.beta_sigma = beta_sigma
        self.gamma = gamma
        self.gamma_sigma = gamma_sigma
        self.rho = rho

    def move(self, joint: Joint, numbers: Tensor, step: Step, out: list[Tensor | None], places: Places) -> Move:
        gram, moving = joint.gram(step.precision), joint.moving
        assert step.losses is not None
        scale = scale_on(step, gram.device)
        norms = gram.diagonal()[: len(moving)].sqrt()
        lengths = step.losses.detach().to(gram.device, torch.float64) / scale
        steps = numbers[1].nan_to_num(0.0) + 1
        rate = torch.where(moving, self.beta * steps**-self.beta_sigma, 0.0)
        taken = torch.where(moving & (norms != 0), rate * lengths / norms, 0.0)
        before = torch.where(numbers[0].isnan(), 1 / moving.sum(dtype=torch.float64), numbers[0])
        of_moving = torch.where(moving, before, 0.0)
        products = new_gram(gram, 1 - rate, taken)
        descent = (products * of_moving).sum(dim=-1) + self.rho * of_moving
        logits = before - self.gamma * steps**-self.gamma_sigma * descent
        weights = torch.where(moving, logits, -torch.inf).softmax(dim=-1)
        return Move(
            1 - rate,
            taken,
            torch.where(moving, weights, 0.0) * scale,
            None,
            torch.where(moving, torch.stack([weights, steps]), numbers),
            gram.isfinite().all() & fits(products, joint.state.dtype),
        )

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, beta_sigma={self.beta_sigma}, gamma={self.gamma}, gamma_sigma={self.gamma_sigma}, "
            f"rho={self.rho}, state_dtype={self.state_dtype}"
        )
