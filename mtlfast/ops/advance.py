"""One step of state that is kept for each task and parameter, and the direction made of it."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast.ops._check import check_grads, check_out, check_state, check_vector
from mtlfast.ops._fake import fake
from mtlfast.task_gradients import TaskGradients


def advance_(
    grads: TaskGradients,
    state: TaskGradients,
    keep: Tensor,
    take: Tensor,
    of_state: Tensor | None = None,
    of_grads: Tensor | None = None,
    square: bool = False,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Moves each task's state towards its gradient, in place, and sums state and gradients over the tasks.

    For every task k and element: s = keep[k] * s + take[k] * x, where x is the gradient g or with `square` g^2. Then
    the result is the sum over the tasks of of_state[k] * s + of_grads[k] * g, with the new s. If one of the numbers in
    `keep`, `take`, `of_state` and `of_grads` is not finite, all state stays as it is and the result is NaN: a step that
    went wrong does not spoil the state, and the device decides that alone.

    Args:
        grads: K tasks x T tensors, P elements for each task.
        state: K tasks x T tensors, of one dtype that may be another than the gradients', with the gradients' shapes,
            device and strides. No entry may share memory with another one, with a gradient or with `out`. An entry of
            None stands for a task without state of that tensor, whose gradient counts by `of_grads` alone. Where the
            gradient is None and the state is not, x is 0. A tensor that no task's gradient reaches is left out: its
            state stays. `TaskGradients` copies a row that kernels cannot take as it is, so read the new state in
            `state.rows`.
        keep: [K], of any real dtype, on the gradients' device, as all four are. With 0, inf and NaN in the state
            still come out as NaN.
        take: [K].
        of_state: [K]. None: zeros.
        of_grads: [K]. None: zeros.
        square: whether the state takes the squares of the gradients.
        out: T tensors to write, with the gradients' shapes, device and strides and one dtype for all. In the gradients'
            dtype they may be the gradients of one task, which are then overwritten. None: new tensors of the gradients'
            dtype.

    Returns:
        T tensors, which are `out` if it is given; None for a tensor that no task's gradient reaches.

    Raises:
        ValueError, TypeError: an argument does not fit, or there are more than 1024 tasks on a GPU. Nothing has been
            written then.

    Cost: one read of the gradients and one read and one write of the state, so 3 * K * P, and one write of P. Products
    and sums are float64 for every dtype. The state is rounded once when it is stored, and the result once, of sums that
    take the state before it is rounded; like torch rounds: to 16 bits by way of float32. Deterministic.

    Example:
        >>> import torch, mtlfast
        >>> grads = mtlfast.TaskGradients.from_matrix(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        >>> state = mtlfast.TaskGradients.from_matrix(torch.zeros(2, 2))
        >>> half, ones = torch.full((2,), 0.5), torch.ones(2)
        >>> mtlfast.ops.advance_(grads, state, keep=half, take=half, of_state=ones)
        [tensor([ 2., -1.])]
        >>> state.rows
        ((tensor([0.5000, 1.0000]),), (tensor([ 1.5000, -2.0000]),))
    """
    write, result = prepared(grads, state, keep, take, of_state, of_grads, square, out)
    write()
    return result


def prepared(
    grads: TaskGradients,
    state: TaskGradients,
    keep: Tensor,
    take: Tensor,
    of_state: Tensor | None = None,
    of_grads: Tensor | None = None,
    square: bool = False,
    out: Sequence[Tensor | None] | None = None,
) -> tuple[Callable[[], object], list[Tensor | None]]:
    """Does all of `advance_` that can fail, and returns what writes, and the result that it will write.

    Values of gradients, state and `out` are read by the writing function alone, so that they may come after this call.
    """
    check_grads("advance_", grads)
    given = {"keep": keep, "take": take, "of_state": of_state, "of_grads": of_grads}
    for name, vector in given.items():
        if vector is not None:
            check_vector("advance_", name, vector, grads)
    if out is not None:
        check_out("advance_", out, grads, ())
    check_state("advance_", "state", state, grads, written=True, out=() if out is None else out)
    with torch.no_grad():
        if out is None:
            out = [None if example is None else torch.empty_like(example) for example in grads.examples()]
        result = [None if shape is None else x for x, shape in zip(out, grads.shapes, strict=True)]
        if not _native.serves(grads.device):
            write = partial(reference.advance_, grads, state, keep, take, of_state, of_grads, square, out)
            return write, result
        zeros = torch.zeros(grads.num_tasks, dtype=torch.float64, device=keep.device)
        coefficients = torch.stack([zeros if x is None else x.double() for x in given.values()])
        absent = zeros.new_empty(0)
        targets = [absent if target is None else target for target in out]
        entries = [absent if entry is None else entry for entry in state.flat()]

    @torch.no_grad()
    def on_kernels() -> None:
        grads.run(
            lambda C, table, of_state: C.advance_(table, of_state, coefficients, square, targets),
            lambda ops: ops.advance_(grads.flat(), grads.num_tasks, entries, coefficients, square, targets),
            state,
        )

    return on_kernels, result


@fake("advance_")
def _fake_advance_(
    rows: list[Tensor | None],
    num_tasks: int,
    state: list[Tensor],
    coefficients: Tensor,
    square: bool,
    out: list[Tensor],
) -> None:
    return None
