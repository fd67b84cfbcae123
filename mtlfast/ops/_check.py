"""The checks that ops share. Each raises an error of one sentence, before anything is written."""

from collections.abc import Collection, Iterator, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from mtlfast._layout import same_layout
from mtlfast.task_gradients import DTYPES, TaskGradients, memory_spans

MOST_GROUPS = 2**21  # as in csrc/cuda/launchers.h


def check_grads(op: str, grads: TaskGradients) -> None:
    """Raises unless `grads` is a TaskGradients."""
    if not isinstance(grads, TaskGradients):
        raise TypeError(
            f"{op}: grads is a {type(grads).__name__}, expected TaskGradients (TaskGradients.from_rows makes one)"
        )


def check_other(op: str, other: TaskGradients, grads: TaskGradients) -> None:
    """Raises unless `other` holds gradients of the same tensors as `grads`: same shapes, dtype and device."""
    if not isinstance(other, TaskGradients):
        raise TypeError(f"{op}: other is a {type(other).__name__}, expected TaskGradients as grads")
    if len(other.shapes) != len(grads.shapes):
        raise ValueError(f"{op}: other has {len(other.shapes)} tensors, expected {len(grads.shapes)} as grads")
    for t, (shape, expected) in enumerate(zip(other.shapes, grads.shapes, strict=True)):
        if shape is not None and expected is not None and shape != expected:
            raise ValueError(f"{op}: other's tensor {t} has shape {list(shape)}, expected {list(expected)} as grads")
    if all(x.shapes.count(None) < len(x.shapes) for x in (other, grads)):  # without a tensor there is no dtype
        if other.dtype != grads.dtype:
            raise TypeError(f"{op}: other has dtype {other.dtype}, expected {grads.dtype} as grads")
        if other.device != grads.device:
            raise ValueError(f"{op}: other is on {other.device}, expected {grads.device} as grads")


def check_vector(op: str, name: str, vector: Tensor, grads: TaskGradients, matrix: bool = False) -> None:
    """Raises unless `vector` is a real tensor [K], or with `matrix` also [R, K], on the gradients' device."""
    K = grads.num_tasks
    expected = f"[{K}] or [R, {K}]" if matrix else f"[{K}]"
    if not isinstance(vector, Tensor):
        raise TypeError(f"{op}: {name} is a {type(vector).__name__}, expected a Tensor of shape {expected}")
    if vector.dim() not in ((1, 2) if matrix else (1,)) or vector.shape[-1] != K:
        raise ValueError(f"{op}: {name} has shape {list(vector.shape)}, expected {expected}")
    if vector.is_complex():
        raise TypeError(f"{op}: {name} has dtype {vector.dtype}, expected a real one")
    if vector.device != grads.device:
        raise ValueError(f"{op}: {name} is on {vector.device}, expected {grads.device} as the task gradients")


def is_index(value: Any) -> bool:
    """Whether the value is an integer: Python's, numpy's or a tensor of one."""
    try:
        index(value)
    except TypeError:
        return False
    return True


def check_groups(
    op: str, groups: Sequence[int], num_tensors: int, num_groups: int | None = None, source: str = ""
) -> int:
    """The number of groups; raises unless `groups` has the index of one of them for each tensor."""
    if isinstance(groups, str | bytes | Tensor) or not isinstance(groups, Collection):
        raise TypeError(
            f"{op}: groups is a {type(groups).__name__}, expected a list with the index of a group for each tensor"
        )
    if len(groups) != num_tensors:
        raise ValueError(f"{op}: groups has {len(groups)} entries, expected {num_tensors}, one for each tensor")
    for t, group in enumerate(groups):
        if type(group) is not int and not is_index(group):  # the first is quicker
            raise TypeError(f"{op}: groups has {group!r} for tensor {t}, expected the index of a group")
    number = num_groups
    if number is None:
        number = min(max(max(groups, default=-1) + 1, min(1, num_tensors)), MOST_GROUPS)
    for t, group in enumerate(groups):
        if not 0 <= group < number:
            raise ValueError(f"{op}: tensor {t} is in group {group}, expected 0 to {number - 1}{source}")
    return number


def check_dtype(op: str, dtype: torch.dtype, subject: str = "dtype is") -> None:
    """Raises unless kernels take `dtype`."""
    if dtype not in DTYPES:
        raise TypeError(f"{op}: {subject} {dtype}, expected float32, float64, bfloat16 or float16")


def check_out(
    op: str,
    out: Sequence[Tensor | None],
    grads: TaskGradients,
    leading: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    """Raises unless `out` can hold the result.

    It must have the gradients' shapes, device and strides, and the dtype `dtype` (None: any one dtype). Each tensor's
    memory must be its own, or that of a whole gradient of the same tensor.
    """
    if not grads.accepts(out, leading, dtype):
        _look_closer(op, out, grads, leading, dtype)


def check_state(
    op: str,
    name: str,
    state: TaskGradients,
    grads: TaskGradients,
    written: bool = False,
    out: Sequence[Tensor | None] = (),
) -> None:
    """Raises unless `state` has rows and tensors like the gradients', of any dtype, in the gradients' strides.

    With `written` each entry must also have memory of its own, which no gradient and no tensor of `out` shares.
    """
    if not isinstance(state, TaskGradients):
        raise TypeError(
            f"{op}: {name} is a {type(state).__name__}, expected TaskGradients (TaskGradients.from_rows makes one)"
        )
    if not grads.looks_like(state):
        _check_alike(op, name, state, grads)
    traced = torch.compiler.is_compiling() or grads.device.type == "meta"
    if written and not traced and not grads.apart_from(state, out):
        _check_state_memory(op, name, state, grads, out)
        for looked_at in (state, grads):
            looked_at.marshal_again()


def _check_alike(op: str, name: str, state: TaskGradients, grads: TaskGradients) -> None:
    """Raises unless `state` has as many tasks and tensors, and the device, shape and strides of each."""
    shape, expected = (state.num_tasks, len(state.shapes)), (grads.num_tasks, len(grads.shapes))
    if shape != expected:
        raise ValueError(
            f"{op}: {name} has {shape[0]} tasks x {shape[1]} tensors, expected {expected[0]} x {expected[1]}"
        )
    for t, (own, gradient) in enumerate(zip(state.examples(), grads.examples(), strict=True)):
        if own is None or gradient is None:
            continue
        where = f"{op}: {name} of tensor {t}"
        if own.device != grads.device:
            raise ValueError(f"{where} is on {own.device}, expected {grads.device} as the task gradients")
        if own.shape != gradient.shape:
            raise ValueError(f"{where} has shape {list(own.shape)}, expected {list(gradient.shape)}")
        if not same_layout(own, gradient.stride()):
            raise ValueError(f"{where} has strides {list(own.stride())}, expected {list(gradient.stride())}")


def _check_state_memory(
    op: str, name: str, state: TaskGradients, grads: TaskGradients, out: Sequence[Tensor | None]
) -> None:
    """Raises if an entry of the state overlaps another one, a gradient or an output."""
    T = len(state.shapes)
    count = state.num_tasks * T
    found = sorted(overlaps([*state.flat(), *grads.flat(), *out], count))  # the first, whatever the addresses
    if not found:
        return
    first, second = found[0]
    other = f"out {second - 2 * count}"
    if second < 2 * count:
        kind, (k, t) = ("state" if second < count else "gradient"), divmod(second % count, T)
        other = f"task {k}'s {kind} of tensor {t}"
    k, t = divmod(first, T)
    raise ValueError(
        f"{op}: task {k}'s entry of {name} for tensor {t} shares memory with {other}, expected memory of its own"
    )


def fits_out(out: Sequence[Tensor | None], grads: TaskGradients, dtype: torch.dtype) -> bool:
    """Whether `out` can hold one weighted sum of the gradients in `dtype`."""
    if grads.accepts(out, (), dtype):
        return True
    try:
        _look_closer("combine", out, grads, (), dtype)
    except (ValueError, TypeError):
        return False
    return True


def _look_closer(
    op: str,
    out: Sequence[Tensor | None],
    grads: TaskGradients,
    leading: tuple[int, ...],
    dtype: torch.dtype | None,
) -> None:
    """Raises if `out` does not fit, and says why. Native code only answers that it may not fit."""
    source = "dtype says"
    if len(out) != len(grads.shapes):
        raise ValueError(f"{op}: out has {len(out)} tensors, expected {len(grads.shapes)}")
    for t, (target, shape) in enumerate(zip(out, grads.shapes, strict=True)):
        if shape is None:
            continue
        if not isinstance(target, Tensor):
            raise TypeError(f"{op}: out {t} is a {type(target).__name__}, expected a Tensor")
        if target.shape != (*leading, *shape):
            raise ValueError(f"{op}: out {t} has shape {list(target.shape)}, expected {[*leading, *shape]}")
        if dtype is None:
            check_dtype(op, target.dtype, f"out {t} has dtype")
            dtype, source = target.dtype, f"out {t}"
        if target.dtype != dtype:
            raise TypeError(f"{op}: out {t} has dtype {target.dtype}, expected {dtype} as {source}")
        if target.device != grads.device:
            raise ValueError(f"{op}: out {t} is on {target.device}, expected {grads.device} as the task gradients")
        strides = out_strides(grads, t, leading)
        if not same_layout(target, strides):
            raise ValueError(f"{op}: out {t} has strides {list(target.stride())}, expected {list(strides)}")
    if not torch.compiler.is_compiling():
        _check_memory(op, out, grads, bool(leading))


def out_strides(grads: TaskGradients, t: int, leading: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an output for tensor t: those of its gradients, after the leading dimension if there is one."""
    first = next(gradient for gradient in grads.column(t) if gradient is not None)
    return (*((first.numel(),) if leading else ()), *first.stride())


def _check_memory(op: str, out: Sequence[Tensor | None], grads: TaskGradients, leading: bool) -> None:
    """Raises if an output overlaps another output, or a gradient that is not a whole one of its tensor and dtype."""
    reached = [target if shape is not None else None for target, shape in zip(out, grads.shapes, strict=True)]
    T = len(reached)
    entries = [*reached, *grads.flat()]
    for first, second in overlaps(entries, T):
        if leading or not _in_place(entries, first, second, T):
            what = (
                f"out {second}" if second < T else f"task {(second - T) // T}'s gradient of tensor {(second - T) % T}"
            )
            raise ValueError(f"{op}: out {first} shares memory with {what}, expected memory of its own")


def overlaps(entries: Sequence[Tensor | None], own: int) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) of entries that share memory, with i < j and i among the first `own` entries.

    It finds at least one pair if there is any, and of several entries in one place not all pairs.
    """
    widest_own = widest = (0, -1)  # (end, index) of the span that reaches furthest, among the first and among all
    for begin, end, i in memory_spans(entries):
        reach, other = widest if i < own else widest_own
        if begin < reach:
            yield min(i, other), max(i, other)
        widest = max(widest, (end, i))
        widest_own = max(widest_own, (end, i)) if i < own else widest_own


def _in_place(entries: Sequence[Tensor | None], i: int, j: int, T: int) -> bool:
    """Whether one is an output and the other the gradient of the same tensor, at the same address in the same dtype."""
    a, b = entries[min(i, j)], entries[max(i, j)]
    assert a is not None
    assert b is not None
    same = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
    return same and min(i, j) < T <= max(i, j) and (max(i, j) - T) % T == min(i, j)
