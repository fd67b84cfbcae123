"""FAMO."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast.weighting._base import Losses, OfPositive


class FAMO(OfPositive):
    """Lets all losses fall at the same relative rate, without the tasks' gradients.

    sum_k z_k log D_k over sum_k z_k / D_k (not differentiated), with z the softmax of learned logits and D_k = L_k -
    min_k + 1e-8. After the step `update` gives the logits the gradient of z (log D before - log D after), by Adam.
    Liu et al., "FAMO: Fast Adaptive Multitask Optimization" (NeurIPS 2023), Algorithm 2.

    Args:
        num_tasks: n.
        min_losses: [n] lower bounds of the losses; None: 0.
        lr: of the logits.
        weight_decay: of the logits; the paper's, the official code has 1e-5.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is not above its bound.

    State: 5 n numbers. Feedback: `update(losses=...)`, the losses of the same batch after the model's step.
    """

    paper = "Liu et al., NeurIPS 2023"
    keeps = "5 n logits, moments and losses"
    lr = Real(0)
    weight_decay = Real(0)
    min_losses: Tensor
    logits: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor
    before: Tensor

    def __init__(
        self, num_tasks: int, min_losses: Tensor | None = None, lr: float = 0.025, weight_decay: float = 1e-3
    ) -> None:
        """See the class."""
        super().__init__(num_tasks)
        if min_losses is not None and min_losses.shape != (num_tasks,):
            raise ValueError(f"FAMO: min_losses has shape {list(min_losses.shape)}, expected [{num_tasks}]")
        self.lr = lr
        self.weight_decay = weight_decay
        bounds = torch.zeros(num_tasks) if min_losses is None else min_losses.detach()
        self.register_buffer("min_losses", bounds.double().clone())
        for name in ("logits", "mean", "square", "steps"):
            self._keep_buffer(name, num_tasks)
        self._keep_buffer("before", num_tasks, fill=torch.nan)

    def _above(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return values - self._of(self.min_losses, tasks).to(values.dtype)

    def _positive(self, values: Tensor, positive: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """`values`, which must be above their bounds."""
        return super()._positive(values, self._above(values, tasks), tasks)

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """A loss whose gradient is a convex combination of the tasks'."""
        shifted = self._above(values, tasks) + 1e-8
        with torch.no_grad():
            now = values.detach().double()
            self._move(self.before, tasks, now, when=now.isfinite())
            weights = self._of(self.logits, tasks).softmax(dim=0).to(values.dtype)
            weights = weights / (weights / shifted).sum()
        return (weights * shifted.log()).sum()

    @torch.no_grad()
    def update(
        self, *, losses: Losses | None = None, norms: Tensor | None = None, metrics: Losses | None = None
    ) -> None:
        """One step of the logits.

        Raises:
            ValueError: there are no losses.
        """
        if losses is None:
            raise ValueError("FAMO: losses is None, expected the losses after the step")
        values, tasks = self._gather(losses)
        before, logits = (self._of(state, tasks) for state in (self.before, self.logits))
        fall = (self._above(before, tasks) + 1e-8).log() - (self._above(values.detach().double(), tasks) + 1e-8).log()
        finite = fall.isfinite().all()
        z = logits.softmax(dim=0)
        gradient = z * (fall - (z * fall).sum()) + self.weight_decay * logits
        mean = 0.9 * self._of(self.mean, tasks) + 0.1 * gradient
        square = 0.999 * self._of(self.square, tasks) + 0.001 * gradient**2
        steps = self._of(self.steps, tasks) + 1
        move = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
        for state, new in (
            (self.mean, mean),
            (self.square, square),
            (self.steps, steps),
            (self.logits, logits - self.lr * move),
        ):
            self._move(state, tasks, new, when=finite)

    def reset(self) -> None:
        """Forgets logits, moments and losses."""
        super().reset()
        for buffer in (self.logits, self.mean, self.square, self.steps):
            buffer.zero_()
        self.before.fill_(torch.nan)
