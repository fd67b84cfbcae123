"""All-reduce: every rank holds the whole mean of every task gradient, as the plain way and the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast.distributed._buckets import buckets_of
from mtlfast.distributed._memory_order import as_tensor
from mtlfast.distributed._ranks import Ranks, Started
from mtlfast.distributed._reduction import Kind


class AllReduced:
    """Gives every rank the mean gradients of all tasks, so that each computes what a single process would.

    Methods that need the gradients as a whole take this way. Traffic of a rank: 2 K P (N - 1) / N elements. Memory:
    K P.

    Args:
        ranks: N ranks, whose replicas are equal.
        parameters: the shared parameters.
        storage_dtype: the dtype in which the gradients are kept; None: their own.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], storage_dtype: torch.dtype | None = None) -> None:
        self._ranks, self._parameters, self._dtype = ranks, parameters, storage_dtype
        self._buckets = buckets_of(parameters, 1)
        self._waiting: list[Started] = []
        self._rows: list[list[Tensor | None]] = []

    def start(self, label: str, gradients: Sequence[Tensor | None]) -> None:
        row: list[Tensor | None] = [None] * len(self._parameters)
        for bucket in self._buckets:
            (whole,) = bucket.filled(gradients, 1, self._ranks.size)
            self._waiting.append(self._ranks.start_sum(f"the reduction of the gradients of {label}", whole))
            for place, parameter, vector in zip(
                bucket.places, bucket.parameters, bucket.split(whole, 0, 1), strict=True
            ):
                row[place] = as_tensor(vector, parameter)
        self._rows.append(row)

    def rows(self) -> list[list[Tensor | None]]:
        for started in self._waiting:
            started.wait()
        rows, self._waiting, self._rows = self._rows, [], []
        if self._dtype is not None:
            rows = [[None if x is None else x.to(self._dtype) for x in row] for row in rows]
        return rows

    def stand_ins(self) -> list[Tensor]:
        return list(self._parameters)

    def kinds(self) -> list[Kind]:
        return [Kind(range(len(self._parameters)), lambda what, values: values)]

    def shards(self, reached: Sequence[bool]) -> None:
        return None

    def whole(self, direction: Sequence[Tensor | None]) -> list[Tensor | None]:
        return list(direction)
