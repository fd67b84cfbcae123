"""The base class of methods that keep state for each parameter, with one tensor for each task."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast._by_task import put, take
from mtlfast._settings import Choice
from mtlfast.aggregation._base import Aggregator
from mtlfast.aggregation._jacobian import AsksJacobian, do_nothing
from mtlfast.aggregation._parameter_state import Key, ParameterState, Places, outside_inference
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import grown
from mtlfast.aggregation._step import Step
from mtlfast.ops._precision import exact_sums, product_rtol
from mtlfast.ops.advance import prepared
from mtlfast.task_gradients import DTYPES, Rows, TaskGradients


class Joint(NamedTuple):
    """The gradients of one step, and beside each gradient the state that belongs to it.

    Attributes:
        tasks: the R tasks, one for each row.
        grads: R rows x T tensors. The row of an absent task is None everywhere.
        state: R rows x T tensors of one dtype; None where a row has no state.
        moving: [R] bool, which of the tasks are present and not left out by the step's mask. The others' state stays.
    """

    tasks: Sequence[int]
    grads: TaskGradients
    state: TaskGradients
    moving: Tensor

    def gram(self, precision: str | None) -> Tensor:
        """The Gram matrix of gradients and state, [2R, 2R] float64: first the gradients' rows, then the state's.

        If they differ in dtype, one parameter's tensors at a time are widened.
        """
        rows: Rows = (*self.grads.rows, *self.state.rows)
        if self.grads.dtype == self.state.dtype:
            return self.grads.total(ops.gram(TaskGradients.from_rows(rows), precision=precision))
        precision = "exact" if exact_sums("gram", self.grads, precision) else "fast"  # as for all parameters together
        dtype = torch.promote_types(self.grads.dtype, self.state.dtype)
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=self.grads.device)
        for t, shape in enumerate(self.grads.shapes):
            if shape is not None:
                column = [(None if (x := row[t]) is None else x.to(dtype),) for row in rows]
                total += ops.gram(TaskGradients.from_rows(column), precision=precision)
        return self.grads.total(total)

    def product_rtol(self, precision: str | None) -> float:
        """The relative precision of a product in `gram`."""
        return max(product_rtol(self.grads, precision), product_rtol(self.state, precision))


class Move(NamedTuple):
    """What one step does with the rows of a `Joint`: the coefficients of `ops.advance_`, and the new numbers.

    Attributes:
        keep: [R] float64, as all four. How much of its state a row keeps.
        take: how much of a row's gradient, or of its square, its state takes.
        of_state: the weights of the new state in the direction; None: zeros.
        of_grads: the weights of the gradients in the direction; None: zeros.
        numbers: the tasks' new entries of the buffer `state`, [S, R].
        finite: a bool tensor without dimensions, whether all gradients are finite.
        then: what is left to do when the second pass has written `out`; it cannot fail.
    """

    keep: Tensor
    take: Tensor
    of_state: Tensor | None
    of_grads: Tensor | None
    numbers: Tensor
    finite: Tensor
    then: Callable[[], None] = do_nothing


class KeepsState(Aggregator):
    """A method that keeps a tensor for each task and parameter, such as an average of the task's gradients.

    A step takes two passes. The first one reads gradients and state and writes nothing. From their products `move`, of
    a subclass, makes the coefficients of the second one, `ops.advance_`, which writes new state and direction. Where
    these are not finite, the direction is NaN and all state stays.

    A task that is absent, or that reaches no parameter, keeps its state. So does a parameter that no task reaches in a
    step, and no product counts it. Where a task does not reach a parameter that another task reaches, its gradient
    counts as zeros. State is that of gradients without the loss scale. The subclass's numbers for each task are in the
    buffer `state`, [S, n], with NaN for a task that has not been there.

    Args:
        state_dtype: the dtype of the state: float32, float64, bfloat16 or float16. None: that of the first gradients,
            or float32 for squares of 16-bit ones. In float16 a state whose norm would be above 65504 does not move.

    Raises:
        ValueError: `state_dtype` is none of these.
    """

    reads = Reads.STATE
    by_element = True
    tensors: ClassVar[str]  # what the tensors are called in a state dict
    size: ClassVar[int]  # S, how many numbers a task has
    square: ClassVar[bool] = False  # does the state take the gradients' squares?
    needs_losses: ClassVar[bool] = False
    state_dtype = Choice(None, *DTYPES)
    state: Tensor | None

    def __init__(self, state_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.state_dtype = state_dtype
        self.register_buffer("state", None)
        self.kept = ParameterState()

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if there are no losses and the method reads them."""
        super().check(step, jacobian)
        if self.needs_losses and step.losses is None:
            raise ValueError(f"{type(self).__name__}: losses is None, expected the tasks' losses")

    def rows_for(self, present: Sequence[int]) -> Sequence[int]:
        """The tasks that have a row in a step: those that are present, and perhaps others."""
        return present

    def has_state(self, task: int) -> bool:
        """Whether the task has state."""
        return True

    @abstractmethod
    def move(self, joint: Joint, numbers: Tensor, step: Step, out: list[Tensor | None], places: Places) -> Move:
        """What the step does with the rows, computed without waiting for a GPU.

        Args:
            joint: gradients and state.
            numbers: [S, R] float64, the tasks' entries of `state`.
            step: the step of the tasks that are present.
            out: where the direction will be written.
            places: where new tensors belong.
        """

    def aggregate(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> None:
        """Makes the whole step."""
        self.prepare(grads, step, out)()

    @torch.no_grad()
    def prepare(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> Callable[[], None]:
        """Makes the first pass, and returns what makes the second."""
        places = self.kept.places(type(self).__name__, grads)
        there = [k for k, row in enumerate(grads.rows) if any(gradient is not None for gradient in row)]
        if not there:
            return do_nothing
        step = step.among(there)
        joint = self._joint(grads, there, step, places)
        state, numbers = self._numbers(joint)
        keep, to_take, of_state, of_grads, new, finite, then = self.move(joint, numbers, step, out, places)
        for coefficients in (keep, to_take, of_state, of_grads):
            if coefficients is not None:
                finite = finite & coefficients.isfinite().all()
        keep = torch.where(finite, keep, math.nan)
        moved = state.clone()
        put(moved, joint.tasks, torch.where(finite, new, numbers))

        write, _ = prepared(joint.grads, joint.state, keep, to_take, of_state, of_grads, self.square, out)

        def finish() -> None:
            with torch.no_grad():
                write()
                then()
                if step.training:
                    self.kept.commit(places)
                    self.state = state.copy_(moved)

        return finish

    def _joint(self, grads: TaskGradients, there: Sequence[int], step: Step, places: Places) -> Joint:
        """The rows of this step, with new state for tasks that have none yet; copies of the state outside training."""
        tasks, present = self.rows_for(step.present), dict(zip(step.present, there, strict=True))
        least = torch.float32 if self.square else grads.dtype  # squares leave the range of float16
        dtype = self.state_dtype or self.kept.dtype(self.tensors) or torch.promote_types(grads.dtype, least)
        examples, none = grads.examples(), [None] * len(grads.shapes)
        state = [
            self.tensors_of(places, (self.tensors, task), examples, dtype, step, task in present)
            if self.has_state(task)
            else none
            for task in tasks
        ]
        moving = torch.zeros(len(tasks), dtype=torch.bool, device=grads.device)
        ones = torch.ones(len(there), dtype=torch.bool, device=grads.device)
        put(moving, [tasks.index(task) for task in present], ones if step.mask is None else step.mask)
        if len(there) < grads.num_tasks or tasks != step.present:
            rows = [grads.rows[present[task]] if task in present else none for task in tasks]
            grads = grads.with_rows(rows)
        return Joint(tasks, grads, TaskGradients.from_rows(state), moving)

    def tensors_of(
        self, places: Places, key: Key, examples: Sequence[Tensor | None], dtype: torch.dtype, step: Step, make: bool
    ) -> list[Tensor | None]:
        """The T tensors of one key, as `ParameterState.tensors` gives them; copies of them outside training."""
        own = self.kept.tensors(places, key, examples, dtype, make)
        return own if step.training else [None if x is None else x.clone() for x in own]

    def _numbers(self, joint: Joint) -> tuple[Tensor, Tensor]:
        """The buffer `state`, grown to the rows' tasks, and their entries [S, R] in it."""
        known = max(joint.tasks) + 1 if self.state is None else max(*joint.tasks, self.state.shape[-1] - 1) + 1
        with outside_inference():  # the state outlives the step
            state = grown(self, self.state, (), (self.size, known), math.nan, joint.grads.device)
        return state, take(state, joint.tasks).clone()

    def reset(self) -> None:
        """Forgets all state, as if new."""
        self.state = None
        self.kept.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self.kept.apply(fn)
        return super()._apply(fn, *args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.kept.saved().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = self.kept.named(list(state_dict), prefix)
        self.kept.load({name[len(prefix) :]: state_dict[name] for name in own})
        others = {name: value for name, value in state_dict.items() if name not in set(own)}
        super()._load_from_state_dict(others, prefix, *rest)


def fits(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether every row of the new state has a norm that its dtype can hold, so that no element overflows.

    Args:
        gram: [R, R] the Gram matrix of the new state.
        dtype: that of the state.
    """
    return (gram.diagonal().clamp(min=0).sqrt() <= torch.finfo(dtype).max).all()


def new_gram(gram: Tensor, keep: Tensor, take: Tensor) -> Tensor:
    """The Gram matrix [R, R] of keep s + take g, from the joint one of g and s, [2R, 2R]."""
    R = len(keep)
    crossed = torch.outer(take, keep) * gram[:R, R:]
    return torch.outer(keep, keep) * gram[R:, R:] + (crossed + crossed.mT) + torch.outer(take, take) * gram[:R, :R]
