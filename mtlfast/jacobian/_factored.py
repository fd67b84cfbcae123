"""Columns of the Jacobian whose rows are products D_k^T X of two matrices, which are never multiplied out.

Of a layer with N rows, task k's gradient of the weight is D_k^T X: X [N, a] is the layer's input, and D_k [N, b] is
the gradient at its output. So

    G_ij = <D_i^T X, D_j^T X> = <D_i, (X X^T) D_j>    and    w J = (sum_k w_k D_k)^T X.

The first takes N^2 (a + K b) multiplications where K weight gradients take K N a b. The second is one weight gradient.
An embedding's X is the matrix that has a 1 for each row's index. There X^T D_k are sums of rows with one index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.aggregation import Groups
from mtlfast.jacobian._layered import LayeredPart
from mtlfast.jacobian._products import Factors, Wide, dtype_of_products, products
from mtlfast.ops._precision import DOUBLE_EPS, OF_ROUNDING, sum_rtol
from mtlfast.task_gradients import TaskGradients


class FactoredPart(LayeredPart):
    """Columns whose rows are products, of one dtype and on one device.

    Args:
        factors: one for each column.
        num_tasks: K.
        wide: the columns whose products are computed in float64.
    """

    def __init__(self, factors: Sequence[Factors], num_tasks: int, wide: Wide) -> None:
        self._factors, self._num_tasks, self._wide = factors, num_tasks, wide
        self._grams: dict[bool, Tensor] = {}  # by whether all products are float64

    @property
    def num_tasks(self) -> int:
        return self._num_tasks

    @property
    def device(self) -> torch.device:
        return self._factors[0].parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return self._factors[0].layer.dtype

    def places(self) -> Sequence[int]:
        return [factor.layer.column for factor in self._factors]

    def reached(self, task: int) -> Iterator[bool]:
        return (factor.deltas[task] is not None for factor in self._factors)

    def product_rtol(self, precision: str | None) -> float:
        """That of products and sums in float32, unless they are float64."""
        if self.dtype == torch.float64:
            return DOUBLE_EPS
        return max(sum_rtol(self.dtype, self._exact(precision)), OF_ROUNDING[self.dtype])

    def _exact(self, precision: str | None) -> bool:
        """Whether all products are computed in float64 although the factors are not."""
        return precision == "exact" and self._wide.everything and self.dtype != torch.float64

    def at(self, columns: Sequence[int]) -> FactoredPart:
        chosen = [factor for factor in self._factors if factor.layer.column in columns]
        return FactoredPart(chosen, self._num_tasks, self._wide)

    def without(self, tasks: Sequence[int]) -> FactoredPart:
        return FactoredPart([factor.without(tasks) for factor in self._factors], self._num_tasks, self._wide)

    def _gradients(self) -> Iterator[tuple[int, int, Tensor]]:
        dtype = dtype_of_products(self.dtype)
        for factor in self._factors:
            for k, delta in enumerate(factor.deltas):
                if delta is not None:
                    yield factor.layer.column, k, factor.gradient(delta.to(dtype))

    def without_cross(self, precision: str | None, groups: Groups | None) -> Tensor | None:
        return None

    def combined(self, weights: Tensor, groups: Groups | None) -> list[Tensor | None]:
        dtype = dtype_of_products(self.dtype)
        deltas = TaskGradients.from_rows(self._rows())
        grouped = None if groups is None else groups.at(self.places())
        sums = ops.combine(deltas, weights.to(self.device), dtype=dtype, groups=grouped)
        return [None if x is None else f.gradient(x) for f, x in zip(self._factors, sums, strict=True)]

    def _rows(self) -> list[list[Tensor | None]]:
        return [[factor.deltas[k] for factor in self._factors] for k in range(self._num_tasks)]

    def _products(self, precision: str | None) -> Tensor:
        exact = self._exact(precision)
        if exact not in self._grams:
            wide = [exact or factor.layer.column in self._wide.columns for factor in self._factors]
            grams, shares = products(self._factors, wide)
            if not exact:
                for i in self._wide.note(shares, self.places()):
                    grams[i] = products([self._factors[i]], [True])[0][0]
            self._grams[exact] = grams
        return self._grams[exact]
