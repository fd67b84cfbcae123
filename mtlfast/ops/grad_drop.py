"""GradDrop: the tasks' gradients of one sign, chosen element by element."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _native, reference
from mtlfast._layout import same_layout
from mtlfast.ops._check import check_grads, check_out, check_vector, out_strides
from mtlfast.ops._fake import example, fake, like_gradients
from mtlfast.ops.flatten import unflatten
from mtlfast.reference.elementwise import drawn
from mtlfast.task_gradients import TaskGradients

PerTensor = Tensor | Sequence[Tensor | None]


def grad_drop(
    grads: TaskGradients,
    seed: Tensor | None = None,
    *,
    uniform: PerTensor | None = None,
    thresholds: PerTensor | None = None,
    leak: Tensor | None = None,
    round_each: bool = False,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """The sum of each element's gradients of one sign, drawn by their sign purity.

    The purity p of an element is the share of its positive gradients: (1 + sum_k g_k / sum_k |g_k|) / 2. For a uniform
    random number u the positive gradients are kept if p > u and the negative ones if p < u. Chen et al., "Just Pick a
    Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout" (NeurIPS 2020), Algorithm 1.

    Without `seed` and `uniform` nothing is drawn, and the result is what is kept on average.

    Args:
        grads: K tasks x T tensors, P elements for each task. A gradient of None is one of zeros.
        seed: one int64 number on the gradients' device. The u of an element follows from it and from the element's
            place among all P, tensor after tensor in the order of memory: the same on a CPU and a GPU.
        uniform: the numbers u instead: T tensors with the gradients' shapes (None for a tensor that no task reaches),
            or one tensor [P]. They are float32, or float64 for float64 gradients, on the gradients' device.
        thresholds: what takes the place of p, in the same form: a function of `sign_purity(grads)`.
        leak: [K], from 0 to 1, how much of a task's gradients counts that are not kept. None: nothing.
        round_each: round every operation to the gradients' dtype, float32 or float64, as plain PyTorch does, and not
            only the result. It needs `uniform`.
        out: T tensors to write, with the gradients' shapes, strides, device and dtype. They may be the gradients of one
            task, which are then overwritten. None: new tensors.

    Returns:
        T tensors, which are `out` if it is given; None for a tensor that no task reaches. Elements whose gradients are
        all 0 are 0. An element for which a gradient is inf or NaN is NaN; with `round_each` it may be infinite.

    Raises:
        ValueError, TypeError: an argument does not fit. Nothing has been written then.

    Cost: one read of K * P and one write of P, and one read of P for `uniform` and for `thresholds`. Sums are float64
    for every dtype, run over the tasks in ascending order and are rounded once. Deterministic for a seed.

    Example:
        >>> import torch, mtlfast
        >>> grads = mtlfast.TaskGradients.from_matrix(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        >>> mtlfast.ops.grad_drop(grads, uniform=torch.tensor([0.5, 0.5]))
        [tensor([ 4., -4.])]
        >>> mtlfast.ops.grad_drop(grads)  # what is kept on average: 2 in a third of all draws, else -4
        [tensor([ 4., -2.])]
    """
    check_grads("grad_drop", grads)
    if leak is not None:
        check_vector("grad_drop", "leak", leak, grads)
    if seed is not None:
        _check_seed(seed, grads)
        if uniform is not None:
            raise ValueError("grad_drop: got both seed and uniform, expected one of them")
    if seed is not None and grads.shards is not None:  # numbers follow from an element's place on all ranks together
        shards, dtype, seed_of_all = grads.shards, wide_dtype(grads), seed
        uniform, seed = (
            [
                None if shape is None else drawn(seed_of_all, shards.indices(t)).to(dtype)
                for t, shape in enumerate(grads.shapes)
            ],
            None,
        )
    if round_each:
        _check_round_each("grad_drop", grads)
        if uniform is None:
            raise ValueError("grad_drop: round_each is True and uniform is None, expected the random numbers")
    numbers = None if uniform is None else _laid_out("uniform", uniform, grads)
    limits = None if thresholds is None else _laid_out("thresholds", thresholds, grads)
    if out is not None:
        check_out("grad_drop", out, grads, (), grads.dtype)
    form = "drawn" if seed is not None else "expected" if numbers is None else "given"
    return _run(grads, form, round_each, seed, numbers, limits, leak, out)


def sign_purity(grads: TaskGradients, *, round_each: bool = False) -> list[Tensor | None]:
    """The sign purity of each element: the share of its positive gradients, p = (1 + sum_k g_k / sum_k |g_k|) / 2.

    Args:
        grads: K tasks x T tensors, P elements for each task. A gradient of None is one of zeros.
        round_each: round every operation to the gradients' dtype, float32 or float64, as plain PyTorch does, and not
            only the result.

    Returns:
        T tensors of float32, or of float64 for float64 gradients; None for a tensor that no task reaches. Where all
        gradients are 0 the purity is 0.5, or NaN with `round_each`. Where one is inf or NaN it is NaN.

    Raises:
        TypeError: an argument does not fit.

    Cost: one read of K * P and one write of P. Deterministic.
    """
    check_grads("sign_purity", grads)
    if round_each:
        _check_round_each("sign_purity", grads)
    return _run(grads, "purity", round_each)


def wide_dtype(grads: TaskGradients) -> torch.dtype:
    """The dtype of uniform numbers, thresholds and purities."""
    return torch.float64 if grads.dtype == torch.float64 else torch.float32


def _run(
    grads: TaskGradients,
    form: str,
    round_each: bool,
    seed: Tensor | None = None,
    uniform: list[Tensor] | None = None,
    thresholds: list[Tensor] | None = None,
    leak: Tensor | None = None,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    if not _native.serves(grads.device):
        if form == "purity":
            return reference.sign_purity(grads, round_each)
        return reference.grad_drop(grads, seed, uniform, thresholds, leak, round_each, out)
    arguments = form, round_each, seed, uniform or [], thresholds or [], leak
    with torch.no_grad():
        if out is None:
            fresh: list[Tensor] = grads.run(
                lambda C, table: C.grad_drop(table, *arguments),
                lambda ops: ops.grad_drop(grads.flat(), grads.num_tasks, *arguments),
            )
            return [None if shape is None else x for x, shape in zip(fresh, grads.shapes, strict=True)]
        targets = [torch.empty(0) if target is None else target for target in out]
        grads.run(
            lambda C, table: C.grad_drop_(table, *arguments, targets),
            lambda ops: ops.grad_drop_(grads.flat(), grads.num_tasks, *arguments, targets),
        )
    return [None if shape is None else x for x, shape in zip(out, grads.shapes, strict=True)]


def _check_seed(seed: Tensor, grads: TaskGradients) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(f"grad_drop: seed is a {type(seed).__name__}, expected a Tensor of one int64 number")
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"grad_drop: seed is {list(seed.shape)} {seed.dtype}, expected one number of torch.int64")
    if seed.device != grads.device:
        raise ValueError(f"grad_drop: seed is on {seed.device}, expected {grads.device} as the task gradients")


def _check_round_each(op: str, grads: TaskGradients) -> None:
    if grads.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: round_each is True for {grads.dtype} gradients, expected float32 or float64")


def _laid_out(name: str, values: PerTensor, grads: TaskGradients) -> list[Tensor]:
    """The numbers that an argument gives for each element, in the gradients' shapes and strides."""
    dtype, P = wide_dtype(grads), grads.numel()
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.numel() != P:
            raise ValueError(f"grad_drop: {name} has shape {list(values.shape)}, expected [{P}]")
        values = unflatten(values, grads)
    if not isinstance(values, Sequence):
        raise TypeError(f"grad_drop: {name} is a {type(values).__name__}, expected a Tensor [{P}] or T tensors")
    if len(values) != len(grads.shapes):
        raise ValueError(f"grad_drop: {name} has {len(values)} tensors, expected {len(grads.shapes)}")
    result = []
    for t, (value, shape) in enumerate(zip(values, grads.shapes, strict=True)):
        if shape is None:
            result.append(torch.empty(0, dtype=dtype, device=grads.device))
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"grad_drop: {name} {t} is a {type(value).__name__}, expected a Tensor")
        if value.shape != shape:
            raise ValueError(f"grad_drop: {name} {t} has shape {list(value.shape)}, expected {list(shape)}")
        if value.dtype != dtype:
            raise TypeError(f"grad_drop: {name} {t} has dtype {value.dtype}, expected {dtype}")
        if value.device != grads.device:
            raise ValueError(f"grad_drop: {name} {t} is on {value.device}, expected {grads.device} as the gradients")
        strides = out_strides(grads, t, ())
        fits = same_layout(value, strides) or value.numel() == 0
        result.append(
            value if fits else torch.empty_strided(shape, strides, dtype=dtype, device=grads.device).copy_(value)
        )
    return result


@fake("grad_drop")
def _fake_grad_drop(
    rows: list[Tensor | None],
    num_tasks: int,
    form: str,
    round_each: bool,
    seed: Tensor | None,
    uniform: list[Tensor],
    thresholds: list[Tensor],
    leak: Tensor | None,
) -> list[Tensor]:
    wide = torch.float64 if example(rows).dtype == torch.float64 else torch.float32
    return like_gradients(rows, num_tasks, wide if form == "purity" else example(rows).dtype)


@fake("grad_drop_")
def _fake_grad_drop_(
    rows: list[Tensor | None],
    num_tasks: int,
    form: str,
    round_each: bool,
    seed: Tensor | None,
    uniform: list[Tensor],
    thresholds: list[Tensor],
    leak: Tensor | None,
    out: list[Tensor],
) -> None:
    return None
