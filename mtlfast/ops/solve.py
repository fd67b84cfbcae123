"""The K x K solvers behind the Gram aggregators."""

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._fake import fake

OP: Any = None if _native.C is None else torch.ops.mtlfast.solve.default
T = TypeVar("T")
# With more tasks the reference serves. csrc/solve/team.h has the same numbers.
MOST_TASKS = {"cpu": 8192, "cuda": 512}


def solve(
    gram: Tensor,
    method: str,
    params: dict[str, float] | Sequence[float] = (),
    inputs: dict[str, Tensor] | Sequence[Tensor | None] = (),
    state: Tensor | None = None,
    tasks: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes one method's weights from Gram matrices.

    Args:
        gram: [..., K, K] float64, symmetric. The leading dimensions are groups, each of which is solved by itself.
        method: a name in the solver list (`csrc/solve/solvers.h`), such as "pcgrad".
        params: all of the method's constants by the names in its header, or a sequence in the header's order.
        inputs: the method's input tensors by name (random keys, losses, ...), with gram's leading dimensions. An absent
            input is left out. Or a sequence in the header's order, with None for an absent input.
        state: [..., S] float64, the method's state. It is changed in place, except for a group whose `gram` is not
            finite.
        tasks: the indices of the K present tasks; None: 0 to K - 1.
        mask: [..., K] bool. A task whose entry is False is left out as if it had not been given: its row of `gram` is
            not read, and its state stays as it is. None: all tasks take part.

    Returns:
        [..., K] float64 weights, or [..., K, K] for a method of coefficients. They are NaN for a group that is not
        finite and 0 where `mask` is False.

    Raises:
        ValueError: `gram` is not [..., K, K] float64; no method has that name; the method takes other params or inputs;
            an input, the state, the mask or `tasks` has a size or device that does not fit; or `tasks` are not
            different indices.
        TypeError: an input is not a Tensor.

    Cost: independent of P. Deterministic. Up to 8192 tasks on the CPU and 512 on a GPU are solved natively. With more,
    the reference serves, which takes seconds to minutes for a quadratic program.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"solve: gram is a {type(gram).__name__}, expected a Tensor [..., K, K]")
    shape = gram.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or gram.dtype != torch.float64:
        raise ValueError(f"solve: gram is {list(shape)} {gram.dtype}, expected [..., K, K] torch.float64")
    solver = reference.SOLVERS.get(method)
    if solver is None:
        raise ValueError(f"solve: method is '{method}', expected one of {', '.join(sorted(reference.SOLVERS))}")
    values = _in_order(method, "params", params, solver.params)
    slots = _in_order(method, "inputs", inputs, solver.inputs) if inputs else ()
    if state is None and torch.compiler.is_compiling():
        state = gram.new_empty(0)  # the same to the op; inductor fails at an op whose only mutable argument is None
    refusal: Exception | None = None
    if shape[-1] <= MOST_TASKS.get(gram.device.type, 0) and _native.serves(gram.device):
        # The op refuses what it cannot read safely. Only then does `_check` look for the argument that does not fit,
        # because for a few tasks the look takes as long as the solve.
        try:
            result: Tensor = OP(gram, method, values, slots, state, tasks, mask)
            return result
        except (RuntimeError, ValueError) as error:
            refusal = error
    _check(gram, method, solver, values, slots, state, tasks, mask)
    if refusal is not None:
        raise refusal
    if gram.is_cuda and _native.serves(gram.device):
        _warn_of_the_reference(gram.device.type)
    return reference.solve(gram, method, [x for x in values if x is not None], slots, state, tasks, mask)


@functools.cache
def _warn_of_the_reference(device: str) -> None:
    """Warns once that the reference will take long."""
    warnings.warn(
        f"mtlfast: solvers take up to {MOST_TASKS[device]} tasks on this device; for more, the plain-PyTorch reference "
        "serves, which takes seconds to minutes a step. Move the Gram matrix to the CPU, or use fewer tasks.",
        stacklevel=4,
    )


def _in_order(
    method: str, kind: str, given: dict[str, T] | Sequence[T | None], names: tuple[str, ...]
) -> Sequence[T | None]:
    """The values that were given by name, in the op's order; None for an absent one that others follow."""
    if not isinstance(given, dict):
        return given
    if tuple(given) == names[: len(given)]:
        return list(given.values())
    if not given.keys() <= set(names):
        raise ValueError(f"solve: {method} got {kind} {_listed(given)}, expected {_listed(names)}")
    return [given.get(name) for name in names]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _check(
    gram: Tensor,
    method: str,
    solver: reference.Solver,
    values: Sequence[float | None],
    slots: Sequence[Tensor | None],
    state: Tensor | None,
    tasks: Sequence[int] | None,
    mask: Tensor | None,
) -> None:
    """Raises for every argument that the op refuses, and names it."""
    K = gram.shape[-1]
    groups = gram.numel() // (K * K) if K else 0
    constants = {name: value for name, value in zip(solver.params, values, strict=False) if value is not None}
    if len(values) != len(solver.params):
        raise ValueError(f"solve: {method} got {len(values)} params, expected {len(solver.params)}")
    if len(constants) != len(solver.params):
        raise ValueError(f"solve: {method} got params {_listed(constants)}, expected {_listed(solver.params)}")
    if len(slots) > len(solver.inputs):
        raise ValueError(f"solve: {method} got {len(slots)} inputs, expected {_listed(solver.inputs)}")
    given = dict(zip(solver.inputs, slots, strict=False))
    required = () if solver.required is None else solver.required(constants)
    for name in solver.inputs:
        x, size = given.get(name), K ** reference.DIMENSIONS[name]
        if x is None:
            if name in required:
                raise ValueError(f"solve: {method} got no input, expected one: {name}")
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"solve: {method} got {name} of type {type(x).__name__}, expected a Tensor")
        if groups and x.numel() != groups * size:
            each = x.numel() / groups
            raise ValueError(f"solve: {method} got an input of {each:g} elements a group, expected {size}: {name}")
        if x.device != gram.device:
            raise ValueError(f"solve: an input is on {x.device}, expected {gram.device} as gram")
    for k, task in enumerate(tasks or ()):
        if task < 0:
            raise ValueError(f"solve: got task {task}, expected an index of at least 0")
        if task in (tasks or ())[:k]:
            raise ValueError(f"solve: got task {task} twice, expected each index once")
    if tasks is not None and len(tasks) != K:
        raise ValueError(f"solve: got {len(tasks)} tasks, expected {K} as gram has rows")
    if mask is not None and (mask.shape != gram.shape[:-1] or mask.dtype != torch.bool or mask.device != gram.device):
        raise ValueError(
            f"solve: mask is {list(mask.shape)} {mask.dtype} on {mask.device}, expected {list(gram.shape[:-1])} "
            f"torch.bool on {gram.device}"
        )
    if state is not None and (state.dtype != torch.float64 or state.device != gram.device):
        raise ValueError(f"solve: state is {state.dtype} on {state.device}, expected torch.float64 on {gram.device}")
    if state is not None and not state.is_contiguous():
        raise ValueError(f"solve: state has strides {list(state.stride())}, expected it to be contiguous")
    each = state.numel() / groups if state is not None and groups else 0
    least = 0 if solver.state is None else solver.state(K if tasks is None else max(tasks, default=-1) + 1)
    if groups and (each < least or each != int(each)):
        raise ValueError(f"solve: {method} got a state of {each:g} elements a group, expected at least {least}")


@fake("solve")
def _fake_solve(
    gram: Tensor,
    method: str,
    params: list[float],
    inputs: list[Tensor | None],
    state: Tensor | None,
    tasks: list[int] | None,
    mask: Tensor | None = None,
) -> Tensor:
    solver = reference.SOLVERS[method]
    _check(gram, method, solver, params, inputs, state, tasks, mask)
    return gram.new_empty(gram.shape if solver.square else gram.shape[:-1])
