"""FAMO."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Real
from mtlfast._vectors import vector
from mtlfast.weighting._adam import Moments, adam
from mtlfast.weighting._base import NeedsPositiveLosses, readable
from mtlfast.weighting._losses import Feedback


class FAMO(NeedsPositiveLosses):
    """Lets all losses fall at the same relative rate, without the tasks' gradients.

    With D_k = L_k - min_k + 1e-8 and z the softmax of learned logits, the weighted loss is sum_k z_k log D_k, divided
    by sum_k z_k / D_k, which is not differentiated. After the optimizer's step, `update` trains the logits by one step
    of Adam on the gradient of sum_k z_k (log D_k before - log D_k after). Liu et al., "FAMO: Fast Adaptive Multitask
    Optimization" (NeurIPS 2023), Algorithm 2.

    Args:
        num_tasks: n, the number of tasks.
        min_losses: [n] lower bounds of the losses; a loss may reach its bound. None: 0.
        lr: the learning rate of the logits.
        weight_decay: the weight decay of the logits. The default is the paper's; its official code has 1e-5.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is below its bound.

    State: 5 n numbers. Feedback: after each step of the optimizer call `update(losses=...)` with the losses of the same
    batch, computed again; without it the weights never change. The logits are no parameters, so your optimizer needs
    none of them.

    Example:
        The first loss falls less than the second, so its weight grows from 1/2.

        >>> import torch
        >>> from mtlfast.weighting import FAMO
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 2.0]))
        >>> weighting = FAMO(num_tasks=2)
        >>> weighting([w[0], w[1]]).backward()
        >>> weighting.update(losses=[1.9, 1.0])
        >>> weighting.logits.softmax(dim=0)
        tensor([0.5125, 0.4875], dtype=torch.float64)
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
        super().__init__(num_tasks)
        self.lr = lr
        self.weight_decay = weight_decay
        self._keep_state("min_losses")
        if min_losses is not None:
            self.min_losses = vector(self, "min_losses", min_losses, length=self._known_tasks())
        for name in ("logits", "mean", "square", "steps"):
            self._keep_state(name)
        self._keep_state("before", fill=torch.nan)

    def _takes_zero(self) -> bool:
        """True, because D_k is positive even where the loss is at its bound."""
        return True

    def _bounds(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        return self._of(self.min_losses, tasks).to(values.dtype)

    def combine(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """The weighted loss, whose gradient is a convex combination of the losses' gradients."""
        shifted = values - self._bounds(values, tasks) + 1e-8
        with torch.no_grad():
            weights = self._of(self.logits, tasks).softmax(dim=0).to(values.dtype)
            weights = weights / (weights / shifted).sum()
            one = self._one_if_finite(weights / shifted, values, tasks, terms=weights * shifted.log())
            now = (values * one).double()
            self._move(self.before, tasks, now, when=now.isfinite())
        return (weights * one * shifted.log()).sum()

    @torch.no_grad()
    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Trains the logits by one step.

        Raises:
            ValueError: `losses` is None; on the CPU, a loss is below its bound. On a GPU the logits stay as they are
                then, and `diagnostics()` counts it.
        """
        if losses is None:
            raise ValueError("FAMO: losses is None, expected the losses after the step")
        values, tasks = self._feedback("losses", losses)
        values = values.to(self.logits.device)
        bounds = self._of(self.min_losses, tasks)
        # A float32 loss may lie below its bound by its rounding.
        wrong = values < bounds - torch.finfo(torch.float32).eps * bounds.abs()
        if readable(values) and bool(wrong.any()):  # host: CPU tensors
            k = int(wrong.nonzero()[0])
            raise ValueError(
                f"FAMO: the loss of task {tasks[k]} is {float(values[k]):g}, expected a number above "
                f"{float(bounds[k]):g} or equal to it"
            )
        self.nonpositive += wrong.any()
        before, logits = (self._of(state, tasks) for state in (self.before, self.logits))
        log_before, log_now = ((loss - bounds).clamp(min=0).add(1e-8).log() for loss in (before, values))
        fall = log_before - log_now
        finite = fall.isfinite().all() & ~wrong.any()
        z = logits.softmax(dim=0)
        gradient = z * (fall - (z * fall).sum()) + self.weight_decay * logits
        states = (self.mean, self.square, self.steps)
        move, moments = adam(gradient, Moments(*(self._of(state, tasks) for state in states)))
        for state, new in zip((*states, self.logits), (*moments, logits - self.lr * move), strict=True):
            self._learn(state, tasks, new, when=finite)

    def reset(self) -> None:
        super().reset()
        for buffer in (self.logits, self.mean, self.square, self.steps):
            buffer.zero_()
        self.before.fill_(torch.nan)
