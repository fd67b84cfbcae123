"""Reduce-scatter: each rank keeps its piece of every task gradient, and one direction is gathered at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtlfast._shards import Shards
from mtlfast.distributed._buckets import Bucket, buckets_of
from mtlfast.distributed._memory_order import as_vector, piece_range
from mtlfast.distributed._ranks import Ranks, Started
from mtlfast.distributed._reduction import Kind
from mtlfast.distributed._stand_ins import stand_in

IN_FLIGHT = 2  # buckets whose reduction runs beside the next task's backward pass


class Scattered:
    """Cuts each parameter's elements, in the order of memory, into one piece for each rank.

    Traffic of a rank: (K + 1) P (N - 1) / N elements, where K all-reduces take twice K P (N - 1) / N. Memory: K P / N
    for the pieces, and two buckets.

    Args:
        ranks: N ranks, whose replicas are equal.
        parameters: the shared parameters.
        storage_dtype: the dtype in which the pieces are kept; None: that of the gradients.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], storage_dtype: torch.dtype | None = None) -> None:
        self._ranks, self._parameters, self._dtype = ranks, parameters, storage_dtype
        self._buckets = buckets_of(parameters, ranks.size)
        self._waiting: deque[Started] = deque()
        self._rows: list[list[Tensor | None]] = []

    def start(self, label: str, gradients: Sequence[Tensor | None]) -> None:
        row: list[Tensor | None] = [None] * len(self._parameters)
        for bucket in self._buckets:
            while len(self._waiting) >= IN_FLIGHT:
                self._waiting.popleft().wait()
            own = bucket.empty(bucket.length)
            rows = bucket.filled(gradients, self._ranks.size, self._ranks.size)
            self._waiting.append(self._ranks.start_scatter(f"the reduction of the gradients of {label}", rows, own))
            for place, piece in zip(bucket.places, self._pieces(bucket, own), strict=True):
                row[place] = piece
        self._rows.append(row)

    def rows(self) -> list[list[Tensor | None]]:
        while self._waiting:
            self._waiting.popleft().wait()
        rows, self._rows = self._rows, []
        if self._dtype is not None:
            rows = [[None if piece is None else piece.to(self._dtype) for piece in row] for row in rows]
        return rows

    def stand_ins(self) -> list[Tensor]:
        return [stand_in(p, (end - start,), start) for p, (start, end) in self._ranges()]

    def kinds(self) -> list[Kind]:
        return [Kind(range(len(self._parameters)), self._ranks.sum)]

    def shards(self, reached: Sequence[bool]) -> Shards:
        return Pieces(self._ranks, self._parameters, reached)

    def whole(self, direction: Sequence[Tensor | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(self._parameters)
        for bucket in self._buckets:
            there = [place for place in bucket.places if direction[place] is not None]
            if not there:
                continue
            own = bucket.empty(bucket.length).zero_()
            for place, piece in zip(bucket.places, self._pieces(bucket, own), strict=True):
                if (values := direction[place]) is not None:
                    piece.copy_(values)
            everyone = self._ranks.gather("the exchange of the update", own)
            for place, whole in zip(bucket.places, bucket.whole(everyone), strict=True):
                found[place] = whole if place in there else None
        return found

    def _pieces(self, bucket: Bucket, row: Tensor) -> list[Tensor]:
        return bucket.split(row, self._ranks.rank, self._ranks.size)

    def _ranges(self) -> list[tuple[Tensor, tuple[int, int]]]:
        return [(p, piece_range(p.numel(), self._ranks.rank, self._ranks.size)) for p in self._parameters]


class Pieces(Shards):
    """The pieces that this rank holds, for methods that work element by element.

    Args:
        ranks: the ranks.
        parameters: the shared parameters.
        reached: for each, whether a task reaches it. Random numbers count the elements of these alone.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], reached: Sequence[bool]) -> None:
        self._ranks, self._parameters = ranks, parameters
        counts = [p.numel() if there else 0 for p, there in zip(parameters, reached, strict=True)]
        self._before = [0, *accumulate(counts)]

    @property
    def numel(self) -> int:
        return self._before[-1]

    def total(self, values: Tensor) -> Tensor:
        return self._ranks.sum("the sum of the products", values.contiguous())

    def indices(self, t: int) -> Tensor:
        start, end = self._range(t)
        return torch.arange(self._before[t] + start, self._before[t] + end, device=self._parameters[t].device)

    def own(self, t: int, whole: Tensor) -> Tensor | None:
        parameter = self._parameters[t]
        if whole.numel() != parameter.numel():
            return None
        start, end = self._range(t)
        vector = whole if whole.dim() == 1 else as_vector(whole.to(parameter.device), parameter)
        return vector[start:end].clone()

    def saved(self, t: int, own: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard  # takes a second to import

        count = self._parameters[t].numel()
        mesh = _mesh(self._ranks.group, own.device.type)
        made: Any = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size((count,)), stride=(1,))
        found: Tensor = made
        return found

    def _range(self, t: int) -> tuple[int, int]:
        return piece_range(self._parameters[t].numel(), self._ranks.rank, self._ranks.size)


@cache
def _mesh(group: Any, device: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device)
