"""GradNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mtlfast._settings import Choice, Real
from mtlfast._vectors import Vector, vector
from mtlfast.weighting._adam import Moments, adam
from mtlfast.weighting._base import NeedsPositiveLosses
from mtlfast.weighting._losses import Feedback
from mtlfast.weighting._norms import Layers, ReadsNorms

Write = Callable[[Tensor, tuple[int, ...], Tensor, Tensor], None]  # a state, tasks, their new entries, and when


class GradNorm(NeedsPositiveLosses, ReadsNorms):
    """Learns weights with which slow tasks have large gradients, so that all tasks train at one rate.

    With n_k = w_k ||g_k|| and r_k = (L_k / L_k(0)) / mean_j (L_j / L_j(0)), each step moves the weights down the
    gradient of sum_k |n_k - mean(n) r_k^alpha|, whose targets are held constant, and scales them back to their old sum:
    they add up to n. A step uses the weights before its own move. Chen et al., "GradNorm: Gradient Normalization for
    Adaptive Loss Balancing in Deep Multitask Networks" (ICML 2018).

    Args:
        num_tasks: n, the number of tasks.
        alpha: how strongly slow tasks are preferred. With 0 all gradients shall have one norm whatever the losses are.
        lr: the learning rate of the weights.
        optimizer: "adam", whose steps do not depend on the size of the gradients, or "sgd".
        form: what is learned: the weights themselves ("linear", as in the paper), of which those that would be
            negative become 0; their logarithms ("log", as in NVIDIA PhysicsNeMo); or logits, whose softmax times n the
            weights are ("softmax", as in LibMTL).
        initial_losses: [n] positive numbers L(0). None: each task's first loss above 0.
        layers: the shared parameters of whose gradients the norms are taken: the last shared layer in the paper. A
            module, a parameter or a list of parameters. None: all shared parameters.

    Raises:
        ValueError: an argument is outside of its range; on the CPU, a loss is negative and alpha is not 0.

    State: 5 n numbers, which the weighting trains itself; your optimizer needs none of them. Pass it to
    `mtlfast.backward(..., weighting=)`, which computes the norms. Without that, call `update(losses=, norms=)` with the
    losses and the norms of the unweighted gradients; until then the weights stay as they are. A step that is not finite
    moves nothing. Present tasks share among them the sum of their weights; those of absent tasks stay.

    Example:
        The first task's gradient is longer, so its weight falls from 1.

        >>> import torch
        >>> from mtlfast.weighting import GradNorm
        >>> weighting = GradNorm(num_tasks=2, alpha=0.0, lr=0.1, optimizer="sgd")
        >>> weighting.update(norms=torch.tensor([3.0, 1.0]))
        >>> weighting.current_weights
        tensor([0.7778, 1.2222], dtype=torch.float64)
    """

    paper = "Chen et al., ICML 2018"
    keeps = "5 n weights, moments and losses"
    alpha = Real(0)
    lr = Real(0)
    optimizer = Choice("adam", "sgd")
    form = Choice("linear", "log", "softmax")
    learned: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor
    initial_losses: Tensor

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 1.5,
        lr: float = 0.025,
        optimizer: Literal["adam", "sgd"] = "adam",
        form: Literal["linear", "log", "softmax"] = "linear",
        initial_losses: Vector | None = None,
        layers: Layers | None = None,
    ) -> None:
        super().__init__(num_tasks)
        self._read_at(layers)
        self.alpha = alpha
        self.lr = lr
        self.optimizer = optimizer
        self.form = form
        for name in ("mean", "square", "steps"):
            self._keep_state(name)
        self._keep_state("learned", fill=1.0 if self.form == "linear" else 0.0)
        self._keep_state("initial_losses", fill=torch.nan)
        self._given: Tensor | None = None
        if initial_losses is not None:
            n = self._known_tasks()
            self._given = vector(self, "initial_losses", initial_losses, length=n, least=0, least_itself=False)
            self.initial_losses.copy_(self._given)

    @property
    def current_weights(self) -> Tensor:
        """[n] float64, the weights as they stand, which add up to n."""
        return self._weights_of(self.learned)

    def _weights_of(self, learned: Tensor) -> Tensor:
        if self.form == "linear":
            return learned.clone()  # a step writes to what is learned
        return self._known_tasks() * learned.softmax(dim=0)

    def _takes_zero(self) -> bool:
        """True: a loss of 0 has been learned."""
        return True

    def _one_if_positive(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor | float:
        """As in the base class; without alpha the losses do not matter."""
        return 1.0 if self.alpha == 0 else super()._one_if_positive(values, tasks)

    def weights(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        weights = self._of(self._weights_of(self.learned), tasks)
        if self._norms is None:
            first = self._first_losses(values, tasks)
            self._move(self.initial_losses, tasks, first, when=values.isfinite().all())
        else:
            self._train(values, self._norms, tasks, self._move)
        return weights

    @torch.no_grad()
    def update(
        self, *, losses: Feedback | None = None, norms: Tensor | None = None, metrics: Feedback | None = None
    ) -> None:
        """Moves the weights by the losses and norms of a step. Without norms it changes nothing.

        Raises:
            ValueError: there are norms but no losses, and alpha is not 0; on the CPU, a loss is negative.
        """
        fed = self._fed(losses, norms)
        if fed is None:
            return
        values = fed.losses
        if values is not None:
            values = values * self._one_if_positive(values, fed.tasks)
        elif self.alpha != 0:
            raise ValueError(f"GradNorm: losses is None, expected the tasks' losses as alpha is {self.alpha:g}")
        self._train(values, fed.norms, fed.tasks, self._learn)

    def _train(self, values: Tensor | None, norms: Tensor, tasks: tuple[int, ...], write: Write) -> None:
        """Moves the weights by one step, unless something is not finite. Without losses all rates are 1."""
        learned, weights = (self._of(of_all, tasks) for of_all in (self.learned, self._weights_of(self.learned)))
        weighted = weights * norms
        first, rates = self._of(self.initial_losses, tasks), torch.ones_like(norms)
        finite = norms.isfinite().all()
        if values is not None:
            first, finite = self._first_losses(values, tasks), finite & values.isfinite().all()
            ratios = (values / first).nan_to_num(nan=1.0)  # a loss of 0 that has never been above
            rates = (ratios / ratios.mean()).nan_to_num(nan=1.0)  # all losses are 0
        slope = (weighted - weighted.mean() * rates**self.alpha).sign() * norms  # with respect to the weights
        if self.form != "linear":
            slope = weights * slope
        if self.form == "softmax":
            slope = slope - weights * slope.sum() / weights.sum()

        states = (self.mean, self.square, self.steps)
        moments = Moments(*(self._of(state, tasks) for state in states))
        move = slope
        if self.optimizer == "adam":
            move, moments = adam(slope, moments)
        new = self._renormalized(learned - self.lr * move, learned)
        for number in (new, *moments):
            finite = finite & number.isfinite().all()
        for state, now in zip((self.initial_losses, *states, self.learned), (first, *moments, new), strict=True):
            write(state, tasks, now, finite)

    def _first_losses(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """L(0) of the present tasks, with these losses where none is known; NaN for one that is not above 0."""
        first = self._of(self.initial_losses, tasks)
        return torch.where(first.isnan() & (values > 0), values, first)

    def _renormalized(self, new: Tensor, old: Tensor) -> Tensor:
        """What is learned of the present tasks, with the weights scaled to their old sum."""
        if self.form == "linear":
            positive = new.clamp(min=0)
            return positive * (old.sum() / positive.sum())
        return new + (old.logsumexp(dim=0) - new.logsumexp(dim=0))

    def reset(self) -> None:
        super().reset()
        for state in (self.mean, self.square, self.steps):
            state.zero_()
        self.learned.fill_(1.0 if self.form == "linear" else 0.0)
        if self._given is None:
            self.initial_losses.fill_(torch.nan)
        else:
            self.initial_losses.copy_(self._given)
