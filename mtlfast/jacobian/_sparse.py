"""Sparse task gradients, held by the indices that at least one task touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast.task_gradients import Rows


class Places(NamedTuple):
    """The places of a parameter that the tasks' sparse gradients touch.

    Attributes:
        indices: [S, U] int64, U places by their indices in the first S dimensions, in order, each once.
        shape: the shape of the parameter.
    """

    indices: Tensor
    shape: torch.Size

    def tensor(self, values: Tensor) -> Tensor:
        """The coalesced sparse tensor with `values` [U, ...] at these places. It keeps the memory of `values`."""
        return torch.sparse_coo_tensor(self.indices, values, self.shape, is_coalesced=True, check_invariants=False)


class Held(NamedTuple):
    """The K tasks' gradients of one parameter as dense tensors.

    Attributes:
        gradients: K tensors of one shape, or None where a task does not reach the parameter.
        places: where the elements [U, ...] of the tensors belong; None if they are of the parameter's shape.
        new: whether the first of the tensors was made here, so that nothing else holds its memory.
    """

    gradients: Sequence[Tensor | None]
    places: Places | None
    new: bool


def stored(gradient: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The gradient in the dtype in which it is stored; None: its own."""
    if dtype is None or gradient.dtype == dtype:
        return gradient
    return (gradient.coalesce() if gradient.is_sparse else gradient).to(dtype)


def has_sparse(rows: Rows) -> bool:
    """Whether one of the gradients is a sparse COO tensor."""
    return any(gradient is not None and gradient.is_sparse for row in rows for gradient in row)


def held_dense(column: Sequence[Tensor | None]) -> Held:
    """Makes dense tensors of one parameter's gradients, of which at least one is sparse.

    If all gradients are sparse, the result has the union of their indices, with zeros where a task does not touch an
    index that another task touches. A task that touches all of them is not copied once more. If one gradient is dense,
    or the gradients differ in the number of sparse dimensions, the result has the shape of the parameter.

    Cost: K * U elements for a union of U indices, and a sort of the indices. On a GPU the host waits for the device,
    which alone knows how many indices there are.
    """
    given = [gradient for gradient in column if gradient is not None]
    dims = {gradient.sparse_dim() if gradient.is_sparse else 0 for gradient in given}
    if len(dims) > 1 or dims == {0}:
        return Held([None if g is None else g.to_dense() if g.is_sparse else g for g in column], None, False)
    coalesced = [gradient.coalesce() for gradient in given]
    shape, numbers = given[0].shape, [_numbers(gradient) for gradient in coalesced]
    if all(torch.equal(of_task, numbers[0]) for of_task in numbers[1:]):
        union, places = numbers[0], Places(coalesced[0]._indices().clone(), shape)
    else:
        union = torch.unique(torch.cat(numbers))
        places = Places(_indices(union, shape[: coalesced[0].sparse_dim()]), shape)
    values = iter(
        _spread(gradient._values(), of_task, union) for gradient, of_task in zip(coalesced, numbers, strict=True)
    )
    new = not given[0].is_coalesced() or len(numbers[0]) < len(union)
    return Held([None if gradient is None else next(values) for gradient in column], places, new)


def _numbers(gradient: Tensor) -> Tensor:
    """The indices of a coalesced tensor as one ascending number each."""
    indices = gradient._indices()
    numbers = indices[0]
    for size, index in zip(gradient.shape[1:], indices[1:], strict=False):
        numbers = numbers * size + index
    return numbers


def _indices(numbers: Tensor, sizes: torch.Size) -> Tensor:
    """The reverse of `_numbers`: [S, U] for the sizes of the S sparse dimensions."""
    return torch.stack(torch.unravel_index(numbers, sizes))


def _spread(values: Tensor, numbers: Tensor, union: Tensor) -> Tensor:
    """`values` at the places of the union, and zeros at its other places."""
    if len(numbers) == len(union):
        return values
    places = torch.searchsorted(union, numbers)
    return values.new_zeros(len(union), *values.shape[1:]).index_copy_(0, places, values)
