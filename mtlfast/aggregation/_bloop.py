"""Bloop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast._settings import Real, Whole
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._keeps_state import Joint, KeepsState, Move, fits, new_gram
from mtlfast.aggregation._parameter_state import Places
from mtlfast.aggregation._step import Step, check_one_of_all, scale_on


class Bloop(KeepsState):
    """Follows the main task's gradient, and the others' as far as they are orthogonal to its running average.

    With the average m of the main task's gradients, of which this step's is one, the direction is
    g_main + lambda_ times the sum over the other tasks of g - <g, m> / |m|^2 m. So the other losses are minimised among
    the minima of the main loss. Hsieh et al., "Careful with that Scalpel: Improving Gradient Surgery with an EMA"
    (ICML 2024).

    Args:
        lambda_: the weight of the other tasks.
        ema: how much of the average each step replaces, above 0 and up to 1. The average starts as the first gradient.
        main_task: the main task's index. In a step without it the average stays.
        state_dtype: the dtype of the average. None: that of the gradients.

    Raises:
        ValueError: an argument is outside of its range.

    State: one average for each parameter, and n float64 numbers. A step that is not finite changes nothing.
    Cost: two reads of the gradients and the average, 2 (K + 1) * P, one write of the average and one of the direction,
    2 * P. Scale-free.
    """

    paper = "Hsieh et al., ICML 2024"
    keeps = "1 average for each parameter"
    tensors = "mean"
    size = 1  # the number of steps, of which the main task's counts
    lambda_ = Real(0)
    ema = Real(0, 1, least_itself=False)
    main_task = Whole(0)

    def __init__(
        self,
        lambda_: float = 0.1,
        ema: float = 0.1,
        main_task: int = 0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype)
        self.lambda_ = lambda_
        self.ema = ema
        self.main_task = main_task

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if all tasks are there and the main one is none of them."""
        super().check(step, jacobian)
        check_one_of_all("Bloop", self.main_task, step)

    def rows_for(self, present: Sequence[int]) -> Sequence[int]:
        return present if self.main_task in present else [*present, self.main_task]

    def has_state(self, task: int) -> bool:
        return task == self.main_task

    def move(self, joint: Joint, numbers: Tensor, step: Step, out: list[Tensor | None], places: Places) -> Move:
        gram, moving, main = joint.gram(step.precision), joint.moving, joint.tasks.index(self.main_task)
        at_main = torch.zeros_like(moving)
        at_main[main] = True
        steps = numbers[0].nan_to_num(0.0)
        rate = torch.where(at_main & moving, torch.where(steps == 0, 1.0, torch.full_like(steps, self.ema)), 0.0)
        keep, taken = 1 - rate, rate / scale_on(step, gram.device)
        R = len(moving)
        products = keep[main] * gram[:R, R + main] + taken[main] * gram[:R, main]  # of the gradients with the average
        average = new_gram(gram, keep, taken)
        square = average[main, main]
        others = torch.where(moving & ~at_main, torch.full_like(steps, self.lambda_), 0.0)
        projected = torch.where(square > 0, -(others * products).sum() / square, 0.0)
        return Move(
            keep,
            taken,
            torch.where(at_main, projected, 0.0),
            torch.where(at_main & moving, 1.0, others),
            torch.where(moving, steps + 1, numbers[0]).unsqueeze(0),
            gram.isfinite().all() & fits(average[main : main + 1, main : main + 1], joint.state.dtype),
        )

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}, ema={self.ema}, main_task={self.main_task}, state_dtype={self.state_dtype}"
