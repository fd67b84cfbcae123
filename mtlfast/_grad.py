"""The one file that touches `.grad`: whose memory a gradient is, what may become `.grad`, and how it gets there.

Everything is prepared first and written last. What can fail (a shape, an allocation) fails in the preparation, so that
an error leaves every `.grad` as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from mtlfast import _native, ops
from mtlfast._layout import overlaps_itself, same_layout
from mtlfast.ops._check import fits_out
from mtlfast.ops.combine import write
from mtlfast.task_gradients import TaskGradients

Pending = list[Callable[[], object]]  # writes to `.grad` that cannot fail any more


def exclusive(rows: Sequence[Sequence[Tensor | None]]) -> list[bool]:
    """For each of T tensors: does nothing but `rows` [K][T] hold its gradients, so that they may be written to?"""
    native = _native.module()
    if native is None:
        return [False] * len(rows[0])
    alone: list[bool] = native.exclusive(rows)
    return alone


def dtype_of(parameter: Tensor) -> torch.dtype:
    """The dtype of the parameter's gradients."""
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", None)
    return parameter.dtype if dtype is None else dtype


def prepared(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], ours: Sequence[bool]) -> Pending:
    """What adds gradients to `.grad`, where there are any.

    Args:
        parameters: T leaf tensors.
        gradients: T gradients, None where there is none; sparse ones stay sparse, as `.backward()` leaves them.
        ours: for each, does nobody else hold its memory? Where `.grad` is None, a gradient of ours that lies in memory
            as its parameter does becomes `.grad` itself; any other is copied.
    """
    pending: Pending = []
    for parameter, gradient, own in zip(parameters, gradients, ours, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            pending.append(partial(_set, parameter, _as_grad(gradient, parameter, own)))
        elif parameter.grad.is_sparse:
            pending.append(partial(_set, parameter, _plus(parameter.grad, gradient)))
        else:
            if overlaps_itself(parameter.grad):
                raise RuntimeError(
                    f"backward: the .grad of a parameter of shape {list(parameter.shape)} is an expanded tensor, which "
                    "cannot be added to; expected one with memory for each element, or None"
                )
            pending.append(partial(parameter.grad.add_, gradient))
    return pending


def prepared_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> Pending:
    """The same for parameters with a gradient each, which is ours."""
    return prepared([p for p, _ in pairs], [g for _, g in pairs], [True] * len(pairs))


def _as_grad(gradient: Tensor, parameter: Tensor, own: bool) -> Tensor:
    """The gradient itself, or a copy that is nobody else's and lies as its parameter does."""
    if gradient.is_sparse:
        return gradient.clone()
    if own and gradient.dtype == dtype_of(parameter) and same_layout(gradient, parameter.stride()):
        return gradient
    return torch.empty_like(parameter, dtype=dtype_of(parameter), requires_grad=False).copy_(gradient)


def _set(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient.data if gradient._is_view() else gradient  # it needs no base any more


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two gradients, of which one or both may be sparse."""
    return b + a if a.is_sparse and not b.is_sparse else a + b


def commit(pending: Pending) -> None:
    """Makes all prepared writes."""
    for write_one in pending:
        write_one()


def weighted(parameters: Sequence[Tensor], grads: TaskGradients, weights: Tensor, ours: Sequence[bool]) -> Pending:
    """What adds w J to `.grad` of the parameters.

    One pass adds in place where every `.grad` is there and lies as the gradients do. Where none is there, a task's own
    tensors take the result and become `.grad`, if nobody else holds them.

    Args:
        parameters: T leaf tensors.
        grads: their K x T task gradients; a tensor that no task reaches leaves its parameter alone.
        weights: [K].
        ours: for each of the T tensors, does nobody else hold its gradients?
    """
    examples = grads.examples()
    reached = [t for t, example in enumerate(examples) if example is not None]
    current = [None if examples[t] is None else parameter.grad for t, parameter in enumerate(parameters)]
    there = sum(current[t] is not None for t in reached)
    if there == len(reached) and fits_out(current, grads, grads.dtype):
        return [partial(write, grads, weights, current, accumulate=True)]
    if there:
        directions = ops.combine(grads, weights)
    else:
        out = [None if x is None else x if own else torch.empty_like(x) for x, own in zip(examples, ours, strict=True)]
        directions = write(grads, weights, out)
    return prepared(parameters, directions, [True] * len(parameters))


def forget(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Sets every `.grad` to None, and returns what they were."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return before


def bring_back(parameters: Iterable[Tensor], before: Iterable[Tensor | None]) -> None:
    """Sets every `.grad` to what it was."""
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient


def fill_with_zeros(parameters: Iterable[Tensor]) -> None:
    """Gives each parameter without a `.grad` one of zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=dtype_of(parameter))


class PlainGradients:
    """The gradients of the leaves that are not shared: each the sum over the tasks, as plain `.backward()` has it.

    Args:
        leaves: the leaf tensors.
        apart: keep each task's gradient by itself until the end, for tasks that are weighted after their backward
            passes. It costs the memory of each task's gradient of a leaf that several tasks reach.
    """

    def __init__(self, leaves: Sequence[Tensor], apart: bool = False) -> None:
        self.leaves = leaves
        self._sums: list[Tensor | None] = [None] * len(leaves)
        self._of_tasks: dict[int, Sequence[Tensor | None]] | None = {} if apart else None

    def collect(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Takes a task's gradients of the leaves, None where it does not reach one."""
        if self._of_tasks is not None:
            self._of_tasks[task] = gradients
        else:
            self._add(gradients)

    def prepared(self, loss_weights: Tensor | None = None) -> Pending:
        """What adds the sums to `.grad`, each task's gradient times its loss weight (1).

        Raises:
            ValueError: there are loss weights, and the tasks' gradients were not kept apart.
        """
        if self._of_tasks is None and loss_weights is not None:
            raise ValueError("write: got loss_weights, expected none as the tasks' gradients were added up already")
        for task, gradients in (self._of_tasks or {}).items():
            self._add(gradients, None if loss_weights is None else loss_weights[task])
        self._of_tasks = None
        sums = (self._sums,)
        return prepared(self.leaves, self._sums, exclusive(sums))

    def _add(self, gradients: Sequence[Tensor | None], weight: Tensor | None = None) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                part = gradient if weight is None else gradient * weight.to(gradient.dtype)
                before = self._sums[i]
                self._sums[i] = part if before is None else _plus(before, part)
