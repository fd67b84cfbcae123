"""What an aggregator is told about one step, and the checks of it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast._by_task import take
from mtlfast.aggregation._groups import Groups


class Step(NamedTuple):
    """What a method is told about one step, besides the task gradients.

    Attributes:
        num_tasks: K, how many tasks are present.
        losses: [K], the losses' values; None if they are not known.
        loss_scale: the factor by which the losses were multiplied, a float or a tensor of one element; None: 1.
        tasks: the indices of the K present tasks among all tasks; None: 0 to K - 1.
        rtol: the relative precision of the gradients, which decides about ranks; None if it is not known.
        training: whether the step counts. If not, no state changes and no random number is drawn. A method that draws
            takes a fixed order or the expected weights instead.
        mask: [..., K] bool, for a selection of tasks that only the device knows. A task whose entry is False gets the
            weight 0, its row is not read, and its state stays as it is. None: all tasks take part.
        precision: how the Gram matrix is summed, as in `mtlfast.ops.gram`; None: as exactly as the method needs.
        groups: the groups of columns, each of which gets weights of its own; None: one surgery for all columns.
    """

    num_tasks: int
    losses: Tensor | None = None
    loss_scale: float | Tensor | None = None
    tasks: tuple[int, ...] | None = None
    rtol: float | None = None
    training: bool = True
    mask: Tensor | None = None
    precision: str | None = None
    groups: Groups | None = None

    def among(self, places: Sequence[int]) -> Step:
        """The same step with only those tasks that stand at these places among the K."""
        return self._replace(
            num_tasks=len(places),
            losses=None if self.losses is None else take(self.losses, places),
            tasks=tuple(self.present[place] for place in places),
            mask=None if self.mask is None else take(self.mask, places),
        )

    @property
    def rank_rtol(self) -> float:
        """`rtol`, or K * 1e-6 if it is not known."""
        return self.num_tasks * 1e-6 if self.rtol is None else self.rtol

    @property
    def present(self) -> Sequence[int]:
        """The present tasks' indices."""
        return range(self.num_tasks) if self.tasks is None else self.tasks


def scale_on(step: Step, device: torch.device) -> Tensor:
    """The loss scale as a float64 tensor without dimensions on `device`, 1 if there is none. No GPU is waited for."""
    scale = step.loss_scale
    if not isinstance(scale, Tensor):
        return torch.full((), 1.0 if scale is None else scale, dtype=torch.float64, device=device)
    return scale.detach().to(device, torch.float64).reshape(())


def task_indices(tasks: Iterable[int] | None) -> tuple[int, ...] | None:
    """Task indices as a tuple of Python integers, from any integers."""
    if tasks is None:
        return None
    try:
        return tuple(map(operator.index, tasks))
    except TypeError:
        raise TypeError(f"tasks is {tasks!r}, expected the present tasks' indices") from None


def check_tasks(caller: str, tasks: Sequence[int], num_tasks: int) -> None:
    """Raises unless `tasks` are `num_tasks` different indices."""
    if len(tasks) != num_tasks:
        raise ValueError(f"{caller}: got {num_tasks} task gradients and {len(tasks)} tasks, expected equal numbers")
    for k, task in enumerate(tasks):
        if task < 0:
            raise ValueError(f"{caller}: got task {task}, expected an index of at least 0")
        if task in tasks[:k]:
            raise ValueError(f"{caller}: got task {task} twice, expected each index once")


def check_one_of_all(caller: str, task: int, step: Step) -> None:
    """Raises if all tasks are there and `task` is none of them."""
    if step.tasks is None and task >= step.num_tasks:
        raise ValueError(f"{caller}: got {step.num_tasks} tasks, expected task {task} among them")
