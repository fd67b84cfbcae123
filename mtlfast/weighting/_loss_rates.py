"""Weights from how fast the losses fall."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._by_task import put
from mtlfast._settings import Choice, Or, Real, Whole
from mtlfast.weighting._base import NeedsPositiveLosses, Weighted
from mtlfast.weighting._losses import Feedback
from mtlfast.weighting._step import Move, write

FAR = 1e300  # beyond which a rate counts as this: its softmax is the same, and infinity would have none


class DWA(Weighted):
    """Tasks whose loss falls slowly weigh more: w_k = K softmax_k(r_k / T) with r_k = L_k(t-1) / L_k(t-2).

    L_k(t) is the loss's mean over epoch t, or over a window of calls. Liu et al., "End-to-End Multi-Task Learning with
    Attention" (CVPR 2019). Until a task has two means, its rate counts as 1; so does one of two means of 0. Also called
    `DynamicWeightAverage`.

    Args:
        num_tasks: n.
        temperature: T; the larger, the more alike the weights.
        window: None: an epoch ends at `update()`; else after so many calls.

    Raises:
        ValueError: an argument is outside of its range.

    State: 4 n + 1 numbers. Feedback: `update()` at an epoch's end, or `update(losses=...)` with its mean losses.
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
        """They add up to K."""
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
        """Ends an epoch, with its mean losses as they were seen, or with those given."""
        means = self.sums / self.counts
        if losses is not None:
            given, tasks = self._feedback("losses", losses)
            means = torch.full_like(self.sums, torch.nan)
            put(means, tasks, given.to(means))
        ends = torch.ones_like(self.calls, dtype=torch.bool)
        for move in self._rolled(means, ends, self.sums, self.counts, self.calls):
            write(*move)

    def step(self) -> None:
        """Ends an epoch; `update()` under the name that torchjd.scalarization gives it."""
        self.update()

    def _rolled(self, means: Tensor, when: Tensor, sums: Tensor, counts: Tensor, calls: Tensor) -> list[Move]:
        """Where `when` holds: the epoch's means become the last ones, for tasks that were there."""
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
    """Tasks whose loss rises, or falls the least, weigh more: w_k = softmax_k(beta s_k), s_k = L_k(t) - L_k(t-1).

    Heydari et al., "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with Multi-Part Loss
    Functions" (2019). At a task's first step s_k = 0.

    Args:
        num_tasks: n.
        beta: positive: the worst task first; negative: the best one first.
        variant: "original"; "normalized": s is divided by sum_k |s_k|; "loss_weighted": w_k is multiplied by |L_k|,
            and all divided by their sum, but not where all losses are 0.

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
        """They add up to 1."""
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
    """Relative loss balancing with random lookback: losses that fell less, since the last step or the first, lead.

    With b(t, t') = K softmax_k(L_k(t) / (tau L_k(t'))):  w(t) = alpha (r w(t-1) + (1 - r) b(t, 0)) +
    (1 - alpha) b(t, t-1), where r is 1 with probability beta and else 0. Bischof and Kraus, "Multi-Objective Loss
    Balancing for Physics-Informed Deep Learning" (2021). At a task's first step its weight is 1.
    The first step is the first one with a loss that is not 0. A loss that rises from 0 leads by far.

    Args:
        num_tasks: n.
        alpha: how much of the old weights stays.
        beta: how often those are the last step's, not the ones that the first step's losses give.
        tau: temperature; the larger, the more alike the weights.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is negative.

    State: 3 n numbers. r is drawn by torch's global generator of the losses' device; after `.eval()` it is its mean,
    beta.
    """

    paper = "Bischof and Kraus, 2021"
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
        """A loss of 0 has fallen the most."""
        return True

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """They add up to K."""
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
        rates = (values / (self.tau * reference)).nan_to_num(nan=1 / self.tau)  # 0 / 0: it stayed
        return len(values) * rates.clamp(max=FAR).softmax(dim=0)

    def reset(self) -> None:
        super().reset()
        for buffer in (self.first, self.last):
            buffer.fill_(torch.nan)
        self.last_weights.fill_(1.0)
