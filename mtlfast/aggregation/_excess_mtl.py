"""ExcessMTL."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast._settings import Real, Whole
from mtlfast.aggregation._keeps_state import Joint, KeepsState, Move
from mtlfast.aggregation._parameter_state import Places
from mtlfast.aggregation._step import Step, scale_on

SMALLEST = 1e-300  # keeps 0 / 0 from the excess risk of an element whose gradients were all zero, and changes no other


class ExcessMTL(KeepsState):
    """Moves the weights towards the tasks that are furthest from their optimum, as their gradients tell.

    With H_k, the sum of the squares of task k's gradients so far, its excess risk is E_k, the sum over the elements of
    g_k^2 / sqrt(H_k). The weights, which add up to 1, become proportional to w_k exp(eta E_k / B_k), and the direction
    is the sum of w_k g_k. B_k is the mean excess risk of the warm-up. Without a warm-up it is that of the first step,
    where B_k counts as 1. He et al., "Robust Multi-Task Learning with Excess Risks" (ICML 2024), in TorchJD's form.

    Args:
        robust_step_size: eta, above 0.
        n_warmup_steps: for how many steps of a task its weight only follows the others' sum.
        state_dtype: the dtype of H. None: that of the gradients. In float16 squares are often zero or infinity.

    Raises:
        ValueError: an argument is outside of its range.

    TorchJD adds 1e-7 below the root and to B_k. A task whose B_k is 0 gets its B_k at a later step here.

    State: a sum of squares for each task and parameter, and 4 n float64 numbers. A step that is not finite changes
    nothing. Scale: not scale-free, because of the first step. The state is that of losses without `loss_scale`.
    Cost: two reads of gradients and sums, 4 K * P, one write of the sums and one of the direction, (K + 1) * P.
    """

    paper = "He et al., ICML 2024"
    keeps = "n sums for each parameter and 4 n numbers"
    tensors = "squares"
    size = 4  # the logarithm of the weight, B, the sum of the warm-up's excess risks, and the number of steps
    square = True
    robust_step_size = Real(0, least_itself=False)
    n_warmup_steps = Whole(0)
    _eps = 0.0  # TorchJD has 1e-7

    def __init__(
        self, robust_step_size: float = 1.0, n_warmup_steps: int = 0, state_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(state_dtype)
        self.robust_step_size = robust_step_size
        self.n_warmup_steps = n_warmup_steps

    def move(self, joint: Joint, numbers: Tensor, step: Step, out: list[Tensor | None], places: Places) -> Move:
        moving, device = joint.moving, joint.grads.device
        factors = (1 / scale_on(step, device)).expand(len(moving))
        risks = joint.grads.total(ops.excess_risks(joint.grads, joint.state, max(self._eps, SMALLEST), factors))
        logs, base, sums, steps = numbers
        logs = torch.where(logs.isnan(), -moving.sum(dtype=torch.float64).log(), logs)
        sums, steps = sums.nan_to_num(0.0), steps.nan_to_num(0.0)
        warm = steps >= self.n_warmup_steps
        if self.n_warmup_steps:
            base = torch.where(base.isnan() & warm, sums / self.n_warmup_steps, base)
        first = base.isnan() | ((base == 0) if self._eps == 0 else False)
        relative = torch.where(first, risks, risks / (base + self._eps))
        logits = logs + torch.where(warm, self.robust_step_size * relative, 0.0)
        new_logs = torch.where(moving, logits, -torch.inf).log_softmax(dim=-1)
        new = [new_logs, torch.where(first & warm, risks, base), torch.where(warm, sums, sums + risks), steps + 1]
        return Move(
            torch.ones_like(risks),
            torch.where(moving, factors.square(), 0.0),
            None,
            torch.where(moving, new_logs.exp(), 0.0),
            torch.where(moving, torch.stack(new), numbers),
            risks.isfinite().all(),
        )

    def extra_repr(self) -> str:
        return (
            f"robust_step_size={self.robust_step_size}, n_warmup_steps={self.n_warmup_steps}, "
            f"state_dtype={self.state_dtype}"
        )
