"""Tensors as vectors of their elements in the order of memory, and the piece of such a vector that a rank holds."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._layout import is_dense, same_layout


def as_vector(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements [P] in the order in which `like` has them in memory; a view if `tensor` has the same strides."""
    if not is_dense(like):
        return tensor.reshape(-1)
    if not same_layout(tensor, like.stride()):
        tensor = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def as_tensor(vector: Tensor, like: Tensor) -> Tensor:
    """The inverse: a view of the contiguous vector [P] with the shape of `like`, and its strides if `like` is dense."""
    strides = like.stride() if is_dense(like) else torch.empty(like.shape, device="meta").stride()
    return vector.as_strided(like.shape, strides)


def piece_length(count: int, ranks: int) -> int:
    """The number of elements of each rank's piece of `count` elements; the last pieces may be shorter or empty."""
    return -(-count // ranks)


def piece_range(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """Where the piece of a rank begins and ends."""
    length = piece_length(count, ranks)
    return min(rank * length, count), min((rank + 1) * length, count)
