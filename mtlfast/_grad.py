"""Writes gradients to `.grad`. No other file does.

It decides whether a gradient itself may become `.grad` or must be copied. All writes are prepared first and made last:
whatever can fail, such as an allocation, fails in the preparation, so that an error leaves every `.grad` as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    """For each of T tensors, whether nothing but `rows` [K][T] holds its gradients, so that they may be overwritten."""
    native = _native.module()
    if native is None:
        return [False] * len(rows[0])
    alone: list[bool] = native.exclusive(rows)
    return alone


def dtype_of(parameter: Tensor) -> torch.dtype:
    """The dtype of the tensor's gradients, which `grad_dtype` may change for a leaf."""
    dtype: torch.dtype | None = getattr(parameter, "grad_dtype", None) if parameter.is_leaf else None
    return parameter.dtype if dtype is None else dtype


def prepared(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], ours: Sequence[bool]) -> Pending:
    """The writes that add gradients to `.grad`.

    Args:
        parameters: T leaf tensors.
        gradients: T gradients, or None where there is nothing to add. Sparse ones stay sparse, as in `.backward()`.
        ours: for each gradient, whether nothing else holds its memory. If so, and if it has the strides of its
            parameter, it becomes `.grad` itself where `.grad` is None. Otherwise it is copied. Dense gradients are
            read by the writes alone, so that their values may come after this call.
    """
    pending: Pending = []
    for parameter, gradient, own in zip(parameters, gradients, ours, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            becomes = _as_grad(gradient, parameter, own)
            if becomes is not gradient and not gradient.is_sparse:
                pending.append(partial(becomes.copy_, gradient))
            pending.append(partial(_set_or_add, parameter, becomes))
        elif parameter.grad.is_sparse:
            pending.append(partial(_set, parameter, plus(parameter.grad, gradient)))
        else:
            refuse_expanded(parameter)
            pending.append(partial(parameter.grad.add_, gradient))
    return pending


def is_there(parameter: Tensor) -> bool:
    """Whether the parameter has a `.grad`."""
    return parameter.grad is not None


def any_sparse(parameters: Sequence[Tensor]) -> bool:
    """Whether a gradient that `prepared` adds to is sparse, for which it needs the values of the new one at once."""
    return any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters)


def refuse_expanded(parameter: Tensor) -> None:
    """Raises if the `.grad` of a parameter cannot be added to: it is an inference tensor, or elements share memory."""
    gradient = parameter.grad
    if gradient is not None and gradient.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"backward: the .grad of a parameter of shape {list(parameter.shape)} was made in inference mode, expected "
            "one that can be added to, or None"
        )
    if gradient is not None and gradient.layout == torch.strided and overlaps_itself(gradient):
        raise RuntimeError(
            f"backward: the .grad of a parameter of shape {list(parameter.shape)} is an expanded tensor, which "
            "cannot be added to; expected one with memory for each element, or None"
        )


def prepared_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> Pending:
    """The same for pairs of a parameter and a gradient whose memory nothing else holds."""
    return prepared([p for p, _ in pairs], [g for _, g in pairs], [True] * len(pairs))


def _as_grad(gradient: Tensor, parameter: Tensor, own: bool) -> Tensor:
    """The gradient itself if it may become `.grad`, otherwise memory with the strides of its parameter.

    A sparse gradient that may not is copied at once.
    """
    if gradient.is_sparse:
        return gradient if own else gradient.clone()
    if own and gradient.dtype == dtype_of(parameter) and same_layout(gradient, parameter.stride()):
        return gradient
    return torch.empty_like(parameter, dtype=dtype_of(parameter), requires_grad=False)


def _set(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient.data if gradient._is_view() else gradient  # `.data` of a view is free of its base


def _set_or_add(parameter: Tensor, gradient: Tensor) -> None:
    """Sets a `.grad` that was None. By now there is one if the losses reach a parameter that a weighting learns."""
    _set(parameter, gradient if parameter.grad is None else plus(parameter.grad, gradient))


def plus(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two gradients, of which one or both may be sparse. Torch adds a sparse tensor to a dense one alone."""
    if not (a.is_sparse and b.is_sparse):
        return b + a if a.is_sparse else a + b
    if a.sparse_dim() != b.sparse_dim():
        return a.to_dense() + b
    if a.dtype in (torch.bfloat16, torch.float16) and a.dtype == b.dtype:  # on the CPU torch cannot add these
        indices, values = torch.cat([a._indices(), b._indices()], 1), torch.cat([a._values(), b._values()])
        return torch.sparse_coo_tensor(indices, values, a.shape, check_invariants=False).coalesce()
    return a + b


def commit(pending: Pending) -> None:
    """Makes all prepared writes."""
    for write_one in pending:
        write_one()


@torch.no_grad()
def call_hooks(parameters: Iterable[Tensor]) -> None:
    """Calls the hooks of `register_post_accumulate_grad_hook`, which `torch.autograd.grad` does not call.

    They run without grad mode, as in `.backward()`, so that a hook may write to its parameter.
    """
    for parameter in parameters:
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
            hook(parameter)


def backward_pass(
    leaves: Sequence[Tensor], outputs: Sequence[Tensor], gradients: Sequence[Tensor], retain_graph: bool
) -> None:
    """An ordinary backward pass, which adds to `.grad` and calls hooks. An error leaves every `.grad` as it was.

    Args:
        leaves: the leaves that the outputs depend on.
        outputs: where the pass starts.
        gradients: those of the outputs.
        retain_graph: keep the graph.

    Raises:
        RuntimeError: a `.grad` cannot be added to.
    """
    for leaf in leaves:
        refuse_expanded(leaf)
    with torch.no_grad():
        before = [(leaf, leaf.grad, None if leaf.grad is None else leaf.grad.clone()) for leaf in leaves]
    try:
        torch.autograd.backward(outputs, gradients, retain_graph=retain_graph)
    except BaseException:
        with torch.no_grad():
            for leaf, gradient, values in before:
                leaf.grad = None if gradient is None or values is None else gradient.copy_(values)
        raise


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within it the hooks of `register_hook` on these tensors do not run, and `retain_grad` adds to no `.grad`."""
    retained = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    kept = [dict(of_tensor) for of_tensor in hooks]
    for of_tensor in hooks:
        of_tensor.clear()
    try:
        yield
    finally:
        for of_tensor, back in zip(hooks, kept, strict=True):
            of_tensor.update(back)
        for tensor, gradient in retained:
            tensor.grad = gradient


def weighted(
    parameters: Sequence[Tensor],
    grads: TaskGradients,
    weights: Tensor,
    ours: Sequence[bool],
    dtype: torch.dtype | None = None,
    finish: Sequence[Callable[[Tensor], Tensor]] = (),
    groups: Sequence[int] | None = None,
) -> Pending:
    """The writes that add w J to `.grad` of the parameters.

    If every `.grad` exists and has the strides of the gradients, one pass adds to them in place. If none exists, the
    result overwrites the gradients of one task, which become `.grad`, where nothing else holds these.

    Args:
        parameters: T leaf tensors.
        grads: their K x T task gradients. A parameter that no task reaches is left alone.
        weights: [K], or [G, K] with groups, on any device.
        ours: for each of the T tensors, whether nothing else holds its gradients.
        dtype: the dtype of the result. None: that of the gradients.
        finish: T functions, each of which makes a parameter's gradient of a weighted sum; empty: the sums are those.
        groups: for each of the T tensors the index of its group. None: no groups.
    """
    examples = grads.examples()
    weights, dtype = weights.to(grads.device), grads.dtype if dtype is None else dtype
    reached = [t for t, example in enumerate(examples) if example is not None]
    current = [None if examples[t] is None else parameter.grad for t, parameter in enumerate(parameters)]
    there = sum(current[t] is not None for t in reached)
    if not finish and there == len(reached) and fits_out(current, grads, dtype):
        return [partial(write, grads, weights, current, accumulate=True, groups=groups)]
    if there or dtype != grads.dtype:
        directions = ops.combine(grads, weights, dtype=dtype, groups=groups)
    else:
        out = [None if x is None else x if own else torch.empty_like(x) for x, own in zip(examples, ours, strict=True)]
        directions = write(grads, weights, out, groups=groups)
    if finish:
        directions = [None if x is None else made(x) for x, made in zip(directions, finish, strict=True)]
    return prepared(parameters, directions, [True] * len(parameters))


@contextmanager
def set_apart(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Within it every `.grad` is None at first, and post-accumulate hooks do not run. Then `.grad` is what it was."""
    hooks = [parameter._post_accumulate_grad_hooks for parameter in parameters]
    kept = [dict(of_parameter or {}) for of_parameter in hooks]
    before = forget(parameters)
    for of_parameter in hooks:
        if of_parameter:
            of_parameter.clear()
    try:
        yield
    finally:
        bring_back(parameters, before)
        for of_parameter, back in zip(hooks, kept, strict=True):
            if of_parameter is not None:
                of_parameter.update(back)


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
    """The gradients of the leaves that are not shared, summed over the tasks as in plain `.backward()`.

    Args:
        leaves: the leaf tensors.
        apart: keep the gradients of each task apart until the end, for tasks that are weighted after their backward
            passes. That takes more memory if several tasks reach one leaf.
    """

    def __init__(self, leaves: Sequence[Tensor], apart: bool = False) -> None:
        self.leaves = leaves
        self._sums: list[Tensor | None] = [None] * len(leaves)
        self._of_tasks: dict[int, Sequence[Tensor | None]] | None = {} if apart else None

    def collect(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Adds a task's gradients of the leaves, with None for a leaf that it does not reach."""
        if self._of_tasks is not None:
            self._of_tasks[task] = gradients
        else:
            self._add(gradients)

    def leave_out(self, tasks: Sequence[int]) -> None:
        """Drops the gradients of these tasks, which were kept apart."""
        for task in tasks:
            assert self._of_tasks is not None
            self._of_tasks.pop(task)

    def reached(self) -> list[Tensor]:
        """After `prepared`: the leaves that have a gradient."""
        return [leaf for leaf, gradient in zip(self.leaves, self._sums, strict=True) if gradient is not None]

    def prepared(self, loss_weights: Tensor | None = None) -> Pending:
        """The writes that add the sums to `.grad`, with each task's gradient multiplied by its loss weight.

        Raises:
            ValueError: there are loss weights, but the tasks' gradients were not kept apart.
        """
        sums = (self.summed(loss_weights),)
        return prepared(self.leaves, sums[0], exclusive(sums))

    def summed(self, loss_weights: Tensor | None = None) -> list[Tensor | None]:
        """Each leaf's sum over the tasks, with each task's gradient multiplied by its loss weight, as in `prepared`."""
        if self._of_tasks is None and loss_weights is not None:
            raise ValueError("write: got loss_weights, expected None as the tasks' gradients are summed already")
        for task, gradients in (self._of_tasks or {}).items():
            self._add(gradients, None if loss_weights is None else loss_weights[task])
        self._of_tasks = None
        return self._sums

    def _add(self, gradients: Sequence[Tensor | None], weight: Tensor | None = None) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                part = gradient if weight is None else gradient * weight.to(gradient.device, gradient.dtype)
                before = self._sums[i]
                self._sums[i] = part if before is None else plus(before, part)
