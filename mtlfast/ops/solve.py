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
# Beyond, the reference serves: csrc/solve/team.h has the same numbers.
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
    """Runs one method's solver on Gram matrices.

    Args:
        gram: [..., K, K] float64, symmetric; leading dimensions are groups, each solved alone.
        method: a name of the solver list (`csrc/solve/solvers.h`), such as "pcgrad".
        params: the method's host constants by the names in its header, all of them; or a sequence in the order there.
        inputs: the method's device inputs (random keys, losses, ...) by name, with gram's leading dimensions, those
            that there are; or a sequence in the header's order, None for an absent one.
        state: [..., S] float64, the method's state, changed in place unless the group's `gram` is not finite.
        tasks: the K present tasks' indices; None: all.
        mask: [..., K] bool, which of them have a part; None: all. The others are left out as if they had not been
            given: what stands in their rows is not read, and their state stays as it is.

    Returns:
        [..., K] float64 weights, or [..., K, K] for a method of coefficients; NaN for a group that is not finite,
        0 where `mask` is False.

    Raises:
        ValueError: `gram` is not [..., K, K] float64, no method has that name, the method takes other params or inputs,
            an input, the state, the mask or tasks have another size or device than they need, or tasks are not
            different indices; TypeError: an input is not a Tensor.

    Cost: none of K * P. Deterministic. Up to 8192 tasks on the CPU and 512 on a GPU are solved natively; beyond, the
    reference serves, which takes seconds to minutes for a step of the quadratic programs.
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
    refusal: Exception | None = None
    if shape[-1] <= MOST_TASKS.get(gram.device.type, 0) and _native.serves(gram.device):
        # The op refuses what it cannot read safely. Which argument that is, is looked for only then: for a few tasks it
        # would take as long as the solve.
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
    """Once: what follows takes long."""
    warnings.warn(
        f"mtlfast: solvers take up to {MOST_TASKS[device]} tasks on this device; beyond, the plain-PyTorch reference "
        "serves, which takes seconds to minutes a step. Move the Gram matrix to the CPU, or use fewer tasks.",
        stacklevel=4,
    )


def _in_order(
    method: str, kind: str, given: dict[str, T] | Sequence[T | None], names: tuple[str, ...]
) -> Sequence[T | None]:
    """What a call gives by name in the op's order: None for what is absent, unless nothing comes behind it."""
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
    """Refuses in one sentence what the op refuses."""
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
            raise ValueError(f"solve: task {task}, expected an index")
        if task in (tasks or ())[:k]:
            raise ValueError(f"solve: task {task} is there twice, expected each once")
    if tasks is not None and len(tasks) != K:
        raise ValueError(f"solve: got {len(tasks)} tasks, expected {K} as gram has")
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
