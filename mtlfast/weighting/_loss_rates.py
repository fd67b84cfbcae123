"""Loss weightings whose weights follow how fast the losses fall."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._by_task import put
from mtlfast._settings import Choice, Or, Real, Whole
from mtlfast.weighting._base import NeedsPositiveLosses, Weighted
from mtlfast.weighting._losses import Feedback
from mtlfast.weighting._step import Move, write

FAR = 1e300  # rates are clamped to this: their softmax is the same, and that of infinity would be NaN


class DWA(Weighted):
    """Gives tasks whose loss falls slowly a larger weight: w_k = K softmax_k(r_k / T), r_k = L_k(t-1) / L_k(t-2).

    L_k(t) is the mean loss over epoch t. The rate r_k is 1 until the task has two means, and where both are 0. Liu et
    al., "End-to-End Multi-Task Learning with Attention" (CVPR 2019). Also called `DynamicWeightAverage`.

    Args:
        num_tasks: n, the number of tasks.
        temperature: T. A larger temperature makes the weights more equal.
        window: after how many calls an epoch ends. None: at a call of `update()`.

    Raises:
        ValueError: an argument is outside of its range.

    State: 4 n + 1 numbers. Feedback: call `update()` at the end of an epoch, or `update(losses=...)` with its mean
    losses.
    """

    paper = "Liu et al., CVPR 2019"
    keeps = "4 n losses and counts"
    temperature = Real(0, least_itself=False)
    window = Or(Whole(1), None)
    sums: Tensor
    counts: Tensor
    calls: Tensor
    last: Tensor
    before_last: Tensor

    def __init__(self, num_tasks: int, temperature: float = 2.0, window: int | None = None) -> None:
        super().__init__(num_tasks)
        self.temperature = temperature
        self.window = window
        for name in ("sums", "counts"):
            self._keep_state(name)
        self._keep_count("calls")
        for name in ("last", "before_last"):
            self._keep_state(name, fill=torch.nan)

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        rates = (self._of(self.last, tasks) / self._of(self.before_last, tasks)).nan_to_num(nan=1.0)
        weights = len(tasks) * (rates / self.temperature).clamp(-FAR, FAR).softmax(dim=0)
        finite = values.isfinite()
        sums, counts = self.sums.clone(), self.counts.clone()
        put(sums, tasks, torch.where(finite, self._of(sums, tasks) + values, self._of(sums, tasks)))
        put(counts, tasks, torch.where(finite, self._of(counts, tasks) + 1, self._of(counts, tasks)))
        moves: list[Move] = [(self.sums, None, sums), (self.counts, None, counts)]
        if self.window is not None:
            calls = self.calls + 1
            moves = self._rolled(sums / counts, calls >= self.window, sums, counts, calls)
        for move in moves:
            self._move(*move)
        return weights

    @torch.no_grad()
    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Ends an epoch, whose mean losses are those of the calls, or `losses` if they are given."""
        means = self.sums / self.counts
        if losses is not None:
            given, tasks = self._feedback("losses", losses)
            means = torch.full_like(self.sums, torch.nan)
            put(means, tasks, given.to(means))
        ends = torch.ones_like(self.calls, dtype=torch.bool)
        for move in self._rolled(means, ends, self.sums, self.counts, self.calls):
            write(*move)

    def step(self) -> None:
        """Ends an epoch like `update()`, under the name that torchjd.scalarization has for it."""
        self.update()

    def _rolled(self, means: Tensor, when: Tensor, sums: Tensor, counts: Tensor, calls: Tensor) -> list[Move]:
        """What ends an epoch where `when` holds: the means of the tasks that were present become the last ones."""
        ended = when & means.isfinite()
        return [
            (self.before_last, None, torch.where(ended, self.last, self.before_last)),
            (self.last, None, torch.where(ended, means, self.last)),
            (self.sums, None, torch.where(when, 0.0, sums)),
            (self.counts, None, torch.where(when, 0.0, counts)),
            (self.calls, None, torch.where(when, 0, calls)),
        ]

    def reset(self) -> None:
        for buffer in (self.sums, self.counts, self.calls):
            buffer.zero_()
        for buffer in (self.last, self.before_last):
            buffer.fill_(torch.nan)


class SoftAdapt(Weighted):
    """Gives tasks whose loss rises or falls least a larger weight: w_k = softmax_k(beta s_k), s_k = L_k(t) - L_k(t-1).

    At a task's first step s_k is 0. Heydari et al., "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural
    Networks with Multi-Part Loss Functions" (2019).

    Args:
        num_tasks: n, the number of tasks.
        beta: a positive number favours the worst task, a negative one the best task.
        variant: "original" is as above. "normalized" divides s by sum_k |s_k|. "loss_weighted" multiplies each w_k by
            |L_k| and divides by the sum, unless all losses are 0.

    Raises:
        ValueError: `variant` is not one of these.

    State: n numbers.
    """

    paper = "Heydari et al., 2019"
    keeps = "n losses"
    beta = Real()
    variant = Choice("original", "normalized", "loss_weighted")
    last: Tensor

    def __init__(self, num_tasks: int, beta: float = 0.1, variant: str = "original") -> None:
        super().__init__(num_tasks)
        self.beta = beta
        self.variant = variant
        self._keep_state("last", fill=torch.nan)

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        slopes = (values - self._of(self.last, tasks)).nan_to_num(nan=0.0)
        self._move(self.last, tasks, values, when=values.isfinite())
        if self.variant == "normalized":
            total = slopes.abs().sum()
            slopes = torch.where(total > 0, slopes / total, slopes)
        weights = (self.beta * slopes).clamp(-FAR, FAR).softmax(dim=0)
        if self.variant != "loss_weighted":
            return weights
        weighted = weights * values.abs()
        total = weighted.sum()
        return torch.where(total > 0, weighted / total, weights)

    def reset(self) -> None:
        self.last.fill_(torch.nan)


class ReLoBRaLo(NeedsPositiveLosses, Weighted):
    """Relative loss balancing with random lookback: losses that fell less since the last or first step weigh more.

    Let b(t, t') = K softmax_k(L_k(t) / (tau L_k(t'))). The weights are w(t) = alpha (r w(t-1) + (1 - r) b(t, 0)) +
    (1 - alpha) b(t, t-1), where r is 1 with probability beta and otherwise 0. A task's step 0 is the first with a loss
    other than 0; its weight at its first step is 1. A loss that rises from 0 gets by far the largest weight. Bischof
    and Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning" (2021).

    Args:
        num_tasks: n, the number of tasks.
        alpha: how much of the old weights is kept.
        beta: the probability that the old weights are those of the last step. Otherwise they compare with step 0.
        tau: the temperature. A larger temperature makes the weights more equal.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is negative.

    State: 3 n numbers. torch's global generator of the losses' device draws r. After `.eval()` r is its mean, beta.
    """

    paper = "Bischof and Kraus, 2021"
    draws = True
    keeps = "3 n losses and weights"
    alpha = Real(0, 1)
    beta = Real(0, 1)
    tau = Real(0, least_itself=False)
    first: Tensor
    last: Tensor
    last_weights: Tensor

    def __init__(self, num_tasks: int, alpha: float = 0.95, beta: float = 0.99, tau: float = 1.0) -> None:
        super().__init__(num_tasks)
        self.alpha = alpha
        self.beta = beta
        self.tau = tau
        for name in ("first", "last"):
            self._keep_state(name, fill=torch.nan)
        self._keep_state("last_weights", fill=1.0)

    def _takes_zero(self) -> bool:
        """True: a loss of 0 has fallen the most."""
        return True

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        first, last, before = (self._of(state, tasks) for state in (self.first, self.last, self.last_weights))
        new = first.isnan() | (first == 0)
        first, last = torch.where(new, values, first), torch.where(last.isnan(), values, last)
        if self.training:
            look_back = torch.rand((), dtype=values.dtype, device=values.device) >= self.beta
            old = torch.where(look_back, self._balance(values, first), before)
        else:
            old = self.beta * before + (1 - self.beta) * self._balance(values, first)
        weights = self.alpha * old + (1 - self.alpha) * self._balance(values, last)
        finite = values.isfinite().all()
        for state, now in ((self.first, first), (self.last, values), (self.last_weights, weights)):
            self._move(state, tasks, now, when=finite)
        return weights

    def _balance(self, values: Tensor, reference: Tensor) -> Tensor:
        rates = (values / (self.tau * reference)).nan_to_num(nan=1 / self.tau)  # 0 / 0: the loss stayed as it was
        return len(values) * rates.clamp(max=FAR).softmax(dim=0)

    def reset(self) -> None:
        super().reset()
        for buffer in (self.first, self.last):
            buffer.fill_(torch.nan)
        self.last_weights.fill_(1.0)
