"""Momentum ConFIG."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast import ops
from mtlfast._settings import Real, Whole
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._keeps_state import Joint, KeepsState, Move, fits, new_gram
from mtlfast.aggregation._parameter_state import Places
from mtlfast.aggregation._step import Step, scale_on
from mtlfast.ops.advance import prepared
from mtlfast.task_gradients import TaskGradients

EPS = 1e-8  # of the direction's root mean square


class PseudoMomentum(KeepsState):
    """Momentum ConFIG: a step takes one task's gradient, or several, and makes a direction of all tasks' momenta.

    m_k is the running average of task k's gradients, divided by 1 - beta_1^t_k for its t_k steps. c is ConFIG's
    direction of m_1 to m_n, of absent tasks too. As Adam divides by the root of its second moment, c is divided by that
    of the pseudo gradient (c (1 - beta_1^t) - beta_1 c' (1 - beta_1^(t-1))) / (1 - beta_1), with the last step's
    direction c' and the t steps since every task has been there. Until then the direction is zero. Liu et al.,
    "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks" (ICLR 2025).

    The direction has the size of Adam's, so use it with SGD.

    Args:
        num_tasks: n, the number of tasks.
        beta_1: how much of the averages is kept, 0 to 1.
        beta_2: how much of the second moment is kept, 0 to 1.
        state_dtype: the dtype of the n averages. None: that of the gradients. The second moment and the last direction
            are float32 at least.

    Raises:
        ValueError: an argument is outside of its range; at a call, a task's index is not below `num_tasks`.

    1e-8 of the direction's root mean square is added to the root of the second moment, where the authors' code adds
    1e-8.

    State: an average for each task and parameter, two more tensors for each parameter, and 2 n float64 numbers. A step
    that is not finite changes nothing. Scale-free; the direction is multiplied by `loss_scale`.
    Cost: two reads of the averages and of the present tasks' gradients, one write of the averages, and about 13 * P;
    the solve takes about n^3 operations.
    """

    paper = "Liu et al., ICLR 2025"
    keeps = "n + 2 averages for each parameter and 2 n numbers"
    tensors = "mean"
    size = 2  # the task's steps, and the steps since all tasks have been there
    num_tasks = Whole(1)
    beta_1 = Real(0, 1, most_itself=False)
    beta_2 = Real(0, 1, most_itself=False)

    def __init__(
        self, num_tasks: int, beta_1: float = 0.9, beta_2: float = 0.999, state_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(state_dtype)
        self.num_tasks = num_tasks
        self.beta_1 = beta_1
        self.beta_2 = beta_2

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """Momentum ConFIG of so many tasks."""
        return cls(num_tasks)

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if there is a task that has no average."""
        super().check(step, jacobian)
        if any(task >= self.num_tasks for task in step.present):
            raise ValueError(
                f"PseudoMomentum: got tasks {list(step.present)}, expected indices below {self.num_tasks} as "
                "num_tasks says"
            )

    def rows_for(self, present: Sequence[int]) -> Sequence[int]:
        return range(self.num_tasks)

    def move(self, joint: Joint, numbers: Tensor, step: Step, out: Sequence[Tensor | None], places: Places) -> Move:
        precision = step.precision or "exact"
        gram, moving, scale = joint.gram(precision), joint.moving, scale_on(step, joint.grads.device)
        steps, calls = numbers.nan_to_num(0.0)
        steps = steps + moving.double()
        ready = (steps > 0).all() & moving.any()
        calls = calls + ready.double()
        keep = torch.where(moving, torch.full_like(steps, self.beta_1), 1.0)
        taken = torch.where(moving, (1 - self.beta_1) / scale, 0.0)
        unbiased = torch.where(steps > 0, 1 / (1 - self.beta_1**steps), 0.0)
        averages = new_gram(gram, keep * unbiased, taken * unbiased)
        params = {"length": -1, "task": 0, "rtol": self.num_tasks * joint.product_rtol(precision)}
        weights = torch.where(ready, ops.solve(averages, "config", params), 0.0)
        finite = gram.isfinite().all() & weights.isfinite().all()
        finite = finite & fits(new_gram(gram, keep, taken), joint.state.dtype)
        square = (averages * torch.outer(weights, weights)).sum().clamp(min=0)
        least = EPS * (square / max(1, joint.grads.whole_numel())).sqrt()
        ready = torch.where(finite, ready.double(), torch.nan)
        last = _SecondMoment(self, joint.grads, step, out, places, calls[0], ready, least, scale)
        return Move(keep, taken, weights * unbiased * scale, None, torch.stack([steps, calls]), finite, last.divide)

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, beta_1={self.beta_1}, beta_2={self.beta_2}, state_dtype={self.state_dtype}"


class _SecondMoment:
    """Divides a direction by the root of the second moment of its pseudo gradients.

    The constructor makes all that needs memory.

    Args:
        owner: the method, which keeps the state.
        grads: the gradients, as examples.
        step: the step.
        out: where the direction will stand.
        places: where new tensors belong.
        calls: how many directions there have been, with this one.
        ready: 1 if there is a direction; 0 if it is zero; NaN if it is not finite, and all state stays.
        eps: what is added to the root.
        scale: the loss scale, by which the direction is multiplied.
    """

    def __init__(
        self,
        owner: PseudoMomentum,
        grads: TaskGradients,
        step: Step,
        out: Sequence[Tensor | None],
        places: Places,
        calls: Tensor,
        ready: Tensor,
        eps: Tensor,
        scale: Tensor,
    ) -> None:
        self.out, self.eps = out, torch.where(eps > 0, eps, 1.0)
        wide = torch.promote_types(grads.dtype, torch.float32)
        self.pseudo = [None if x is None else torch.empty_like(x, dtype=wide) for x in out]
        last, moments = (
            owner.tensors_of(places, (what, 0), grads.examples(), wide, step, True) for what in ("direction", "moment")
        )
        direction, pseudo, before, moment = (
            TaskGradients.from_rows([row]) for row in (out, self.pseudo, last, moments)
        )
        beta_1, beta_2 = owner.beta_1, owner.beta_2
        bias, zero = (1 - beta_1**calls) / scale, 0 * ready  # the direction in `out` has the loss scale
        to_pseudo = _of_one_row(zero + 1, zero, zero - beta_1 / (1 - beta_1), bias / (1 - beta_1))
        to_before = _of_one_row(1 - ready, ready * bias, zero, zero + 1)
        unbiased = ready / (1 - beta_2 ** calls.clamp(min=1))
        to_moment = _of_one_row(1 - ready * (1 - beta_2), ready * (1 - beta_2), unbiased, zero)
        self.writes = [  # the pseudo gradient is made of the last direction before this one stands in its place
            prepared(direction, before, *to_pseudo, out=self.pseudo)[0],
            prepared(direction, before, *to_before, out=out)[0],
            prepared(pseudo, moment, *to_moment, square=True, out=self.pseudo)[0],
        ]

    def divide(self) -> None:
        """Moves the second moment, and divides the direction."""
        for write in self.writes:
            write()
        for root, target in zip(self.pseudo, self.out, strict=True):
            if root is not None and target is not None:
                target.div_(root.sqrt_().add_(self.eps))


def _of_one_row(
    keep: Tensor, take: Tensor, of_state: Tensor, of_grads: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The coefficients of one row, [1] each."""
    return keep.reshape(1), take.reshape(1), of_state.reshape(1), of_grads.reshape(1)
