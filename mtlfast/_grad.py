"""The one file that touches `.grad`: whose memory a gradient is, what may become `.grad`, and how it gets there.

Everything is prepared first and written last. What can fail (a shape, an allocation) fails in the preparation, so that
an error leaves every `.grad` as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mtlfast import _native, ops
from mtlfast._layout import same_layout
from mtlfast.ops._check import fits_out
from mtlfast.ops.combine import write
from mtlfast.task_gradients import TaskGradients

Pending = list[tuple[Tensor, Tensor]]  # parameters, each with the gradient that is to be added to its `.grad`


def exclusive(rows: Sequence[Sequence[Tensor | None]]) -> list[bool]:
    """For each of T tensors: does nothing but `rows` [K][T] hold its gradients, so that they may be written to?"""
    native = _native.module()
    if native is None:
        return [False] * len(rows[0])
    alone: list[bool] = native.exclusive(rows)
    return alone


def prepared(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], ours: Sequence[bool]) -> Pending:
    """The parameters that get a gradient, each with one that may become its `.grad`.

    Args:
        parameters: T leaf tensors.
        gradients: T gradients, None where there is none.
        ours: for each, does nobody else hold its memory? Where `.grad` is None, a gradient of ours that lies in memory
            as its parameter does becomes `.grad` itself; any other is copied.
    """
    pending = []
    for parameter, gradient, own in zip(parameters, gradients, ours, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None and not (own and _may_be_grad(gradient, parameter)):
            gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
        pending.append((parameter, gradient))
    return pending


def add(pending: Pending) -> None:
    """Adds prepared gradients to `.grad`; where that is None, the gradient becomes it."""
    for parameter, gradient in pending:
        if parameter.grad is None:
            parameter.grad = gradient.detach() if gradient._is_view() else gradient  # it needs no base any more
        else:
            parameter.grad.add_(gradient)


def add_weighted(parameters: Sequence[Tensor], grads: TaskGradients, weights: Tensor, ours: Sequence[bool]) -> None:
    """Adds w J to `.grad` of the parameters.

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
        write(grads, weights, current, accumulate=True)
        return
    if there:
        directions = ops.combine(grads, weights)
    else:
        out = [None if x is None else x if own else torch.empty_like(x) for x, own in zip(examples, ours, strict=True)]
        directions = write(grads, weights, out)
    add(prepared(parameters, directions, [True] * len(parameters)))


def forget(parameters: Iterable[Tensor]) -> None:
    """Sets every `.grad` to None."""
    for parameter in parameters:
        parameter.grad = None


def fill_with_zeros(parameters: Iterable[Tensor]) -> None:
    """Gives each parameter without a `.grad` one of zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _may_be_grad(gradient: Tensor, parameter: Tensor) -> bool:
    return gradient.dtype == parameter.dtype and same_layout(gradient, parameter.stride())


class PlainGradients:
    """The gradients of the leaves that are not shared: each the sum over the tasks, as plain `.backward()` has it.

    Args:
        leaves: the leaf tensors.
        apart: keep each task's gradient by itself until the end, for tasks that are weighted after their backward
            passes. It costs the memory of each task's gradient of a leaf that several tasks reach.
    """

    def __init__(self, leaves: Sequence[Tensor], apart: bool = False) -> None:
        """See the class."""
        self.leaves = leaves
        self._apart = apart
        self._of_tasks: list[list[tuple[int, Tensor]]] = [[] for _ in leaves]

    def collect(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Takes a task's gradients of the leaves, None where it does not reach one."""
        for found, gradient in zip(self._of_tasks, gradients, strict=True):
            if gradient is None:
                continue
            if found and not self._apart:
                found[0] = (0, found[0][1] + gradient)
            else:
                found.append((task, gradient))

    def prepared(self, loss_weights: Tensor | None = None) -> Pending:
        """The sums, each task's gradient times its loss weight (1), ready to be added.

        Raises:
            ValueError: there are loss weights, and the tasks' gradients were not kept apart.
        """
        if loss_weights is not None and not self._apart:
            raise ValueError("write: got loss_weights, expected none as the tasks' gradients were added up already")
        totals = [_sum(found, loss_weights) for found in self._of_tasks]
        self._of_tasks = [[] for _ in self.leaves]  # what is held twice cannot become a `.grad`
        return prepared(self.leaves, totals, exclusive((totals,)))


def _sum(found: Sequence[tuple[int, Tensor]], loss_weights: Tensor | None) -> Tensor | None:
    total: Tensor | None = None
    for task, gradient in found:
        part = gradient if loss_weights is None else gradient * loss_weights[task].to(gradient.dtype)
        total = part if total is None else total + part
    return total
