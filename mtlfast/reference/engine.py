"""The engine's ops in plain PyTorch, computed in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast.reference.pcgrad import pcgrad_coefficients
from mtlfast.task_gradients import TaskGradients

BLOCK = 1024  # columns


def gram(
    grads: TaskGradients,
    other: TaskGradients | None = None,
    precision: str | None = None,
    groups: Sequence[int] | None = None,
    num_groups: int = 1,
) -> Tensor:
    """The Gram matrix J J^T, [K, K] float64; with `other` the cross-Gram J_a J_b^T [K, K'].

    Every `precision` is float64 here. With `groups`, [G, K, K] or [G, K, K']: the matrix of each group of tensors.
    """
    if groups is not None:
        parts = zip(*(_by_group(x, groups, num_groups) for x in (grads, other) if x is not None), strict=True)
        return torch.stack([gram(*part).to(grads.device) for part in parts])
    both, K = grads if other is None else TaskGradients([*grads.rows, *other.rows]), grads.num_tasks
    others = slice(0 if other is None else K, None)  # the rows of `both` that those of `grads` are multiplied with
    result = torch.zeros(K, len(both.rows[others]), dtype=torch.float64, device=both.device)
    for t, shape in enumerate(both.shapes):
        if shape is not None:
            column = _column(both, t)
            result += _products(column[:K], column[others])
    # A matrix product need not be symmetric to the last bit.
    return result.tril() + result.tril(-1).T if other is None else result


def _products(left: Tensor, right: Tensor) -> Tensor:
    """A product [K, n] @ [K', n]^T block by block: over a long row, one running sum would often round the same way."""
    count = left.shape[1] // BLOCK
    blocks = [x[:, : count * BLOCK].reshape(len(x), count, BLOCK).transpose(0, 1) for x in (left, right)]
    rest = left[:, count * BLOCK :] @ right[:, count * BLOCK :].T
    total: Tensor = (blocks[0] @ blocks[1].mT).sum(dim=0) + rest
    return total


def _by_group(grads: TaskGradients, groups: Sequence[int], num_groups: int) -> list[TaskGradients]:
    """The gradients of each group of tensors by itself."""
    columns: list[list[int]] = [[] for _ in range(num_groups)]
    for t, group in enumerate(groups):
        columns[group].append(t)
    return [TaskGradients([[row[t] for t in some] for row in grads.rows]) for some in columns]


def norms(grads: TaskGradients, order: int = 2, groups: Sequence[int] | None = None, num_groups: int = 1) -> Tensor:
    """The norm of each task's gradient, [K] float64, of order 2 or 1; with `groups` [G, K]."""
    if groups is not None:
        parts = _by_group(grads, groups, num_groups)
        return torch.stack([norms(part, order).to(grads.device) for part in parts])
    result = torch.zeros(grads.num_tasks, dtype=torch.float64, device=grads.device)
    for t, shape in enumerate(grads.shapes):
        if shape is not None:
            result += _column(grads, t).abs().pow(order).sum(dim=1)
    return result.pow(1 / order)


def combine(
    grads: TaskGradients,
    weights: Tensor,
    out: Sequence[Tensor | None] | None = None,
    accumulate: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    groups: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """scale * w J: weights [K] -> T tensors [*shape]; weights [R, K] -> T tensors [R, *shape]; new ones of `dtype`.

    With `groups`, tensor t takes the row groups[t] of weights [G, K] -> T tensors [*shape].
    """
    result: list[Tensor | None] = []
    with torch.no_grad():
        for t, shape in enumerate(grads.shapes):
            if shape is None:
                result.append(None)
                continue
            own = weights if groups is None else weights[groups[t]]
            total = (scale * own.double() @ _column(grads, t)).reshape((*own.shape[:-1], *shape))
            target = None if out is None else out[t]
            if target is None:
                target = _empty_out(grads, t, own, dtype or grads.dtype).copy_(total)
            else:
                target.copy_(target.double() + total if accumulate else total)
            result.append(target)
    return result


def flatten(grads: TaskGradients, dtype: torch.dtype | None = None) -> Tensor:
    """The Jacobian [K, P]: each task's gradients one after another."""
    columns = [_column(grads, t) for t, shape in enumerate(grads.shapes) if shape is not None]
    empty = torch.empty(grads.num_tasks, 0, dtype=torch.float64, device=grads.device)
    return torch.cat([empty, *columns], dim=1).to(dtype or grads.dtype)


def unflatten(vector: Tensor, like: TaskGradients | Sequence[Tensor]) -> list[Tensor | None]:
    """Views of a [P] vector with the shapes of `like`."""
    shapes = like.shapes if isinstance(like, TaskGradients) else tuple(tensor.shape for tensor in like)
    parts = torch.split(vector, [0 if shape is None else shape.numel() for shape in shapes]) if shapes else ()
    return [None if shape is None else part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def project(grads: TaskGradients, order: Tensor | None = None) -> TaskGradients:
    """PCGrad's K projected gradients: the coefficients of Algorithm 1 on the K x P matrix, then their sums."""
    matrix = flatten(grads, torch.float64)
    stacked = combine(grads, pcgrad_coefficients(matrix, order))
    columns = [(None,) * grads.num_tasks if x is None else x.unbind(0) for x in stacked]
    return TaskGradients.from_rows(list(zip(*columns, strict=True)) if columns else [()] * grads.num_tasks)


def scale_(grads: TaskGradients, factors: Tensor) -> TaskGradients:
    """Multiplies each task's gradients by its factor, in place."""
    with torch.no_grad():
        for row, factor in zip(grads.rows, factors.double().clone(), strict=True):  # one may lie in a gradient
            for gradient in row:
                if gradient is not None:
                    gradient.copy_(gradient.double() * factor)
    return grads


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
    """s = keep s + take x in place with x = g or g^2, and the sum over the tasks of of_state s + of_grads g.

    Where a coefficient is not finite, the state stays and the sum is NaN.
    """
    zeros = torch.zeros(grads.num_tasks, dtype=torch.float64, device=grads.device)
    given = [zeros if x is None else x.double().clone() for x in (keep, take, of_state, of_grads)]
    finite = torch.stack(given).isfinite().all()
    nan = zeros.new_tensor(torch.nan)
    result: list[Tensor | None] = []
    with torch.no_grad():
        for t, example in enumerate(grads.examples()):
            if example is None:
                result.append(None)
                continue
            total = torch.zeros_like(example, dtype=torch.float64, requires_grad=False)
            for g, s, a, b, c, d in zip(grads.column(t), state.column(t), *given, strict=True):
                x = total.new_zeros(()) if g is None else g.double()
                if s is not None:
                    new = a * s.double() + b * (x * x if square else x)
                    s.copy_(torch.where(finite, new.to(s.dtype), s))
                    total += c * new
                total += d * x
            target = torch.empty_like(example, requires_grad=False) if out is None else out[t]
            assert target is not None
            result.append(target.copy_(torch.where(finite, total, nan)))
    return result


def excess_risks(grads: TaskGradients, sums: TaskGradients, eps: float = 1e-7, factors: Tensor | None = None) -> Tensor:
    """The sum of g^2 / sqrt(H + g^2 + eps) over each task's elements, [K] float64; g is multiplied by `factors`."""
    result = torch.zeros(grads.num_tasks, dtype=torch.float64, device=grads.device)
    for k, (row, sums_row) in enumerate(zip(grads.rows, sums.rows, strict=True)):
        for g, h in zip(row, sums_row, strict=True):
            if g is not None:
                squares = (g.detach().double() * (1 if factors is None else factors[k].double())).square()
                before = 0 if h is None else h.double()
                result[k] += (squares / (before + squares + eps).sqrt()).sum()
    return result


def _column(grads: TaskGradients, t: int) -> Tensor:
    """The K gradients of tensor t as a [K, numel] float64 matrix."""
    shape = grads.shapes[t]
    assert shape is not None
    zeros = torch.zeros(shape.numel(), dtype=torch.float64, device=grads.device)
    return torch.stack([zeros if g is None else g.detach().double().reshape(-1) for g in grads.column(t)])


def _empty_out(grads: TaskGradients, t: int, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of `dtype` with the strides of tensor t, behind the leading dimension of [R, K] weights."""
    first = next(g for g in grads.column(t) if g is not None)
    if weights.dim() == 1:
        return torch.empty_like(first, dtype=dtype, requires_grad=False)
    return first.new_empty_strided((len(weights), *first.shape), (first.numel(), *first.stride()), dtype=dtype)
