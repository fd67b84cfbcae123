"""Buckets: the gradients of several parameters in one message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast.distributed._memory_order import as_tensor, as_vector, piece_length, piece_range

BYTES = 25 * 2**20  # of a bucket, as DistributedDataParallel's: long enough for bandwidth, short enough to overlap


class Bucket(NamedTuple):
    """Some parameters of one dtype on one device.

    Attributes:
        places: their places among all parameters.
        parameters: the parameters.
        lengths: for each, the number of elements of a piece.
    """

    places: list[int]
    parameters: list[Tensor]
    lengths: list[int]

    @property
    def length(self) -> int:
        """The number of elements of one piece of all of them."""
        return sum(self.lengths)

    def empty(self, *shape: int) -> Tensor:
        """New memory in the dtype of the gradients and on their device."""
        first = self.parameters[0]
        return torch.empty(shape, dtype=_grad.dtype_of(first), device=first.device)

    def filled(self, gradients: Sequence[Tensor | None], pieces: int, ranks: int) -> Tensor:
        """The gradients divided by the number of ranks, so that the sum over the ranks is their mean, [pieces, length].

        Row r holds piece r of each parameter, one after the other, with zeros behind shorter pieces. The division is
        part of the copy. A gradient of None is one of zeros.
        """
        rows = self.empty(pieces, self.length)
        for columns, parameter, place in zip(
            torch.split(rows, self.lengths, dim=1), self.parameters, self.places, strict=True
        ):
            gradient = gradients[place]
            if gradient is None:
                columns.zero_()
                continue
            vector, length = as_vector(gradient, parameter), columns.shape[1]
            whole = len(vector) // length if length else 0
            torch.div(vector[: whole * length].view(whole, length), ranks, out=columns[:whole])
            if whole < pieces:
                columns[whole:].zero_()
                rest = vector[whole * length :]
                torch.div(rest, ranks, out=columns[whole, : len(rest)])
        return rows

    def split(self, row: Tensor, piece: int, pieces: int) -> list[Tensor]:
        """For each parameter the view of its piece in a row [length], without the zeros behind it."""
        sizes = [piece_range(parameter.numel(), piece, pieces) for parameter in self.parameters]
        return [of[: end - start] for of, (start, end) in zip(torch.split(row, self.lengths), sizes, strict=True)]

    def whole(self, rows: Tensor) -> list[Tensor]:
        """The parameters' whole gradients, in new memory, from all pieces [pieces, length]."""
        gradients = []
        for columns, parameter in zip(torch.split(rows, self.lengths, dim=1), self.parameters, strict=True):
            vector = columns.new_empty(parameter.numel())
            length = columns.shape[1]
            full = len(vector) // length if length else 0
            vector[: full * length].view(full, length).copy_(columns[:full])
            if full * length < len(vector):
                vector[full * length :].copy_(columns[full, : len(vector) - full * length])
            gradients.append(as_tensor(vector, parameter))
        return gradients


def buckets_of(parameters: Sequence[Tensor], pieces: int, most: int = BYTES) -> list[Bucket]:
    """The parameters in their order in buckets of at most `most` bytes, or of one parameter each.

    Args:
        parameters: of any dtypes and devices.
        pieces: into how many pieces each parameter is cut.
        most: the size of a bucket.
    """
    found: list[Bucket] = []
    sizes: list[int] = []
    for place, parameter in enumerate(parameters):
        kind = (_grad.dtype_of(parameter), parameter.device)
        size = parameter.numel() * kind[0].itemsize
        last = found[-1] if found else None
        if last is None or kind != _kind(last) or sizes[-1] + size > most:
            last = Bucket([], [], [])
            found.append(last)
            sizes.append(0)
        sizes[-1] += size
        last.places.append(place)
        last.parameters.append(parameter)
        last.lengths.append(piece_length(parameter.numel(), pieces))
    return found


def _kind(bucket: Bucket) -> tuple[torch.dtype, torch.device]:
    first = bucket.parameters[0]
    return _grad.dtype_of(first), first.device
