"""Which row of a gradient belongs to which sample."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowMap(NamedTuple):
    """Which row belongs to which sample: row n to sample (n // inner) % number, for outer * number * inner rows.

    Attributes:
        outer: how often all samples come in turn.
        number: S.
        inner: how many rows of one sample stand together.
    """

    outer: int
    number: int
    inner: int

    def by_sample(self, rows: Tensor) -> Tensor:
        """[S, outer * inner, ...] for rows [N, ...]."""
        rest = rows.shape[1:]
        return rows.reshape(self.outer, self.number, self.inner, *rest).transpose(0, 1).reshape(self.number, -1, *rest)

    def summed(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The sums of each sample's rows along a dimension, which becomes S long."""
        if self.outer == self.inner == 1:
            return rows
        shape = rows.shape
        apart = rows.reshape(*shape[:dim], self.outer, self.number, self.inner, *shape[dim + 1 :])
        return apart.sum(dim=(dim, dim + 2))

    def spread(self, of_samples: Tensor) -> Tensor:
        """[N] each row's entry of [S]."""
        one = of_samples.repeat_interleave(self.inner)
        return one.repeat(self.outer)
