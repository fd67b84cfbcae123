"""What parts of a Jacobian have in common whose products are known for each layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlfast.aggregation import Groups


class LayeredPart(ABC):
    """Columns whose rows are not in memory, but whose products are known for each of them."""

    @property
    @abstractmethod
    def num_tasks(self) -> int:
        """K, the number of tasks."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of what the part answers."""

    @abstractmethod
    def places(self) -> Sequence[int]:
        """The columns' places among all columns."""

    @abstractmethod
    def _products(self, precision: str | None) -> Tensor:
        """The Gram matrix of each column, [L, K, K] float64."""

    @abstractmethod
    def _gradients(self) -> Iterator[tuple[int, int, Tensor]]:
        """Each gradient with its column's place and its task, one at a time."""

    def gram(self, precision: str | None, groups: Groups | None) -> Tensor:
        return self._summed(self._products(precision), groups)

    def _summed(self, of_columns: Tensor, groups: Groups | None) -> Tensor:
        """The sums [K, K] or [G, K, K] of matrices [L, K, K], always in the same order."""
        if groups is None:
            return of_columns.sum(dim=0)
        total = of_columns.new_zeros(len(groups.names), *of_columns.shape[1:])
        for one, group in zip(of_columns, groups.at(self.places()), strict=True):
            total[group] += one
        return total

    def norms(self, order: int, groups: Groups | None) -> Tensor:
        if order == 2:
            return self.gram(None, groups).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        shape = (1 if groups is None else len(groups.names), self.num_tasks)
        norms = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for place, task, gradient in self._gradients():
            group = 0 if groups is None else groups.of_column[place]
            norms[group, task] += torch.linalg.vector_norm(gradient, 1, dtype=torch.float64)
            del gradient  # before the next one is made
        return norms[0] if groups is None else norms
