"""What an aggregator is told about one step."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from mtlfast._by_task import take


class Step(NamedTuple):
    """One step as a method sees it, beside the task gradients.

    Attributes:
        num_tasks: K, how many tasks are present.
        losses: [K], the losses' values; None: not known.
        loss_scale: what the losses were multiplied by, a float or a tensor of one element; None: 1.
        tasks: the K present tasks' indices among all; None: there are no others.
        rtol: the relative precision of the gradients, for decisions about ranks; None: not known.
        mask: [..., K] bool, which of these tasks have a part in the direction, where the device alone knows; None: all.
            The others' weights are 0, what stands in their rows is not read, and their state stays as it is.
        precision: of the Gram matrix's sums, as `mtlfast.ops.gram` has it; None: as exact as the method needs it.
        training: does the step count? If not, no state moves, no random number is drawn, and a method that draws takes
            a fixed order or expected weights.
    """

    num_tasks: int
    losses: Tensor | None = None
    loss_scale: float | Tensor | None = None
    tasks: tuple[int, ...] | None = None
    rtol: float | None = None
    training: bool = True
    mask: Tensor | None = None
    precision: str | None = None

    def among(self, places: Sequence[int]) -> Step:
        """The step of those of its tasks that stand in these places alone."""
        return self._replace(
            num_tasks=len(places),
            losses=None if self.losses is None else take(self.losses, places),
            tasks=tuple(self.present[place] for place in places),
        )

    @property
    def rank_rtol(self) -> float:
        """`rtol`, or K * 1e-6 where it is not known."""
        return self.num_tasks * 1e-6 if self.rtol is None else self.rtol

    @property
    def present(self) -> Sequence[int]:
        """The present tasks' indices."""
        return range(self.num_tasks) if self.tasks is None else self.tasks


def task_indices(tasks: Iterable[int] | None) -> tuple[int, ...] | None:
    """Tasks in any form of integers."""
    if tasks is None:
        return None
    try:
        return tuple(map(operator.index, tasks))
    except TypeError:
        raise TypeError(f"tasks is {tasks!r}, expected the present tasks' indices") from None


def check_tasks(caller: str, tasks: Sequence[int], num_tasks: int) -> None:
    """One sentence unless `tasks` are `num_tasks` different indices."""
    if len(tasks) != num_tasks:
        raise ValueError(f"{caller}: got {num_tasks} task gradients and {len(tasks)} tasks, expected as many")
    for k, task in enumerate(tasks):
        if task < 0:
            raise ValueError(f"{caller}: task {task}, expected an index")
        if task in tasks[:k]:
            raise ValueError(f"{caller}: task {task} is there twice, expected each once")


def plain_number(loss_scale: float | Tensor | None) -> float | Tensor | None:
    """A loss scale in one form: a tensor without dimensions, or a float; what is no number stays for the check."""
    if loss_scale is None or type(loss_scale) in (float, int):
        return loss_scale
    if isinstance(loss_scale, Tensor):
        return loss_scale.reshape(()) if loss_scale.numel() == 1 and loss_scale.dim() else loss_scale
    try:
        return loss_scale if isinstance(loss_scale, str | bool) else float(loss_scale)
    except (TypeError, ValueError, OverflowError):
        return loss_scale


def check_loss_scale(caller: str, loss_scale: float | Tensor) -> None:
    """One sentence unless it is one number above 0, as far as that can be seen without waiting for a GPU."""
    if isinstance(loss_scale, Tensor):
        if loss_scale.numel() != 1:
            raise ValueError(f"{caller}: loss_scale has shape {list(loss_scale.shape)}, expected a number")
        if loss_scale.device.type != "cpu":
            return
    try:
        value = math.nan if isinstance(loss_scale, str | bool) else float(loss_scale)  # host: a CPU tensor at most
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{caller}: loss_scale is {loss_scale!r}, expected a number above 0")
