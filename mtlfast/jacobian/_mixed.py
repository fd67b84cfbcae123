"""Columns of the Jacobian of K mixtures of the losses of S samples, from one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtlfast.aggregation import Groups
from mtlfast.jacobian._layered import LayeredPart
from mtlfast.jacobian._products import Wide, dtype_of_products, share_left
from mtlfast.jacobian._sample_products import SampleLayer
from mtlfast.jacobian._samples import Samples
from mtlfast.ops._precision import DOUBLE_EPS, OF_ROUNDING, sum_rtol


class MixedPart(LayeredPart):
    """Columns whose rows are A times the gradients of the samples, which are never all computed.

    Args:
        layers: one for each column, of one dtype and on one device.
        samples: A.
        absent: the tasks that do not take part.
        wide: the columns whose products are computed in float64.
    """

    def __init__(self, layers: Sequence[SampleLayer], samples: Samples, absent: frozenset[int], wide: Wide) -> None:
        self._layers, self._samples, self._absent, self._wide = layers, samples, absent, wide
        self._grams: dict[bool, tuple[Tensor, Tensor]] = {}  # by whether all products are float64

    @property
    def num_tasks(self) -> int:
        return self._samples.num_tasks

    @property
    def device(self) -> torch.device:
        return self._layers[0].parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors."""
        return self._layers[0].dtype

    def places(self) -> Sequence[int]:
        return [layer.column for layer in self._layers]

    def reached(self, task: int) -> Iterator[bool]:
        return (task not in self._absent for _ in self._layers)

    def product_rtol(self, precision: str | None) -> float:
        """That of the gradients' rounding, where it is known that no error of a product is large.

        The mixing itself is float64. So for gradients of samples that do not nearly depend on each other an error is
        small beside what A leaves of them, even for tasks that A makes nearly opposite. Where they do, `Wide` has the
        products computed in float64; on a GPU a later step knows.
        """
        if self.dtype == torch.float64:
            return DOUBLE_EPS
        known = precision == "exact" and (self._wide.everything or self.device.type == "cpu")
        return max(sum_rtol(self.dtype, known), OF_ROUNDING[self.dtype])

    def _exact(self, precision: str | None) -> bool:
        """Whether all products are computed in float64."""
        return precision == "exact" and self._wide.everything

    def at(self, columns: Sequence[int]) -> MixedPart:
        chosen = [layer for layer in self._layers if layer.column in columns]
        return MixedPart(chosen, self._samples, self._absent, self._wide)

    def without(self, tasks: Sequence[int]) -> MixedPart:
        return MixedPart(self._layers, self._samples, self._absent | frozenset(tasks), self._wide)

    def _products(self, precision: str | None) -> Tensor:
        return self._by_layer(precision)[0]

    def without_cross(self, precision: str | None, groups: Groups | None) -> Tensor:
        return self._summed(self._by_layer(precision)[1], groups)

    def _gradients(self) -> Iterator[tuple[int, int, Tensor]]:
        by_sample = self._samples.weights(torch.eye(self.num_tasks, dtype=torch.float64, device=self.device))
        for layer in self._layers:
            for k, weights in enumerate(by_sample):
                if k not in self._absent:
                    yield layer.column, k, layer.gradient(weights, dtype_of_products(self.dtype))

    def combined(self, weights: Tensor, groups: Groups | None) -> list[Tensor | None]:
        by_sample = self._samples.weights(self._present(weights))
        dtype = dtype_of_products(self.dtype)
        return [
            layer.gradient(by_sample if groups is None else by_sample[groups.of_column[layer.column]], dtype)
            for layer in self._layers
        ]

    def _present(self, weights: Tensor) -> Tensor:
        """The weights with 0 for the tasks that are absent."""
        if not self._absent:
            return weights
        return weights.index_fill(-1, torch.tensor(sorted(self._absent), device=weights.device), 0)

    def compute(self) -> tuple[Tensor, Tensor]:
        """[L, K, K] twice, as `_by_layer` has it, with the precision that earlier steps have found to be needed."""
        return self._by_layer("exact")

    def _by_layer(self, precision: str | None) -> tuple[Tensor, Tensor]:
        """[L, K, K] float64: that of each layer, and what it would be for orthogonal gradients of samples."""
        exact = self._exact(precision)
        if exact not in self._grams:
            wide = [exact or layer.column in self._wide.columns for layer in self._layers]
            grams, squares = map(torch.stack, zip(*map(self._of_layer, self._layers, wide), strict=True))
            if not exact:
                for i in self._wide.note(self._shares(grams, wide), self.places()):
                    grams[i], squares[i] = self._of_layer(self._layers[i], True)
            self._grams[exact] = self._without_absent(grams, self._samples.gram_of_diagonal(squares))
        return self._grams[exact]

    def _without_absent(self, grams: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The same with zeros for the tasks that do not take part."""
        if not self._absent:
            return grams, own
        absent = torch.tensor(sorted(self._absent), device=grams.device)
        return tuple(x.index_fill(1, absent, 0).index_fill(2, absent, 0) for x in (grams, own))  # type: ignore[return-value]

    def _of_layer(self, layer: SampleLayer, wide: bool) -> tuple[Tensor, Tensor]:
        """[K, K] a layer's Gram matrix, and [S] the squared norms of its samples' gradients.

        Where products in float64 are not enough, because the rows are float64 already and cancel, the Gram matrix is
        that of the tasks' gradients.
        """
        gram, squares = layer.gram(self._samples, dtype_of_products(self.dtype, wide))
        if wide and self.dtype == torch.float64:
            exact = layer.gram_of_tasks(self._samples)
            gram = torch.where(exact.isfinite(), exact, gram)  # 0 times NaN, of a sample of another task, is NaN
        return gram, squares

    def _shares(self, grams: Tensor, wide: Sequence[bool]) -> Tensor:
        """[L, K] the share of each squared norm in the squares of its terms; 1 for layers that are float64 already."""
        unknown = grams.new_zeros(self._samples.number)
        known: dict[object, Tensor] = {}
        squares = [
            unknown if is_wide else torch.stack([use.squares(known) for use in layer.uses]).sum(dim=0)
            for layer, is_wide in zip(self._layers, wide, strict=True)
        ]
        sums = self._samples.gram_of_diagonal(torch.stack(squares)).diagonal(dim1=-2, dim2=-1)
        return share_left(grams.diagonal(dim1=-2, dim2=-1), sums)
