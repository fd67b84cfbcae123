"""Columns of mixtures of samples whose rows are dropped as soon as their products are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtlfast.aggregation import Groups
from mtlfast.jacobian._mixed import MixedPart
from mtlfast.jacobian._products import Wide
from mtlfast.jacobian._sample_products import SampleLayer
from mtlfast.jacobian._samples import Samples

WeightedPass = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]


class StreamedPart(MixedPart):
    """A `MixedPart` that has the Gram matrices of its layers in place of their rows.

    A weighted sum takes an ordinary backward pass of the samples' weighted losses. Products that turn out to need
    float64 get it in the next step.

    Args:
        layers: as in `MixedPart`, and so are `samples`, `absent` and `wide`. Their rows are not read.
        dtype: that of the rows.
        grams: what `MixedPart.compute` returned of them.
        weighted_pass: makes the gradients of parameters, for weights [S] of the samples' losses.
    """

    def __init__(
        self,
        layers: Sequence[SampleLayer],
        samples: Samples,
        absent: frozenset[int],
        wide: Wide,
        dtype: torch.dtype,
        grams: tuple[Tensor, Tensor],
        weighted_pass: WeightedPass,
    ) -> None:
        super().__init__(layers, samples, absent, wide)
        self._dtype, self._computed, self._weighted_pass = dtype, grams, weighted_pass

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def at(self, columns: Sequence[int]) -> StreamedPart:
        chosen = [i for i, layer in enumerate(self._layers) if layer.column in columns]
        return self._with([self._layers[i] for i in chosen], self._absent, chosen)

    def without(self, tasks: Sequence[int]) -> StreamedPart:
        return self._with(self._layers, self._absent | frozenset(tasks), list(range(len(self._layers))))

    def _with(self, layers: Sequence[SampleLayer], absent: frozenset[int], chosen: list[int]) -> StreamedPart:
        grams, own = (of_layers[chosen] for of_layers in self._computed)
        return StreamedPart(layers, self._samples, absent, self._wide, self.dtype, (grams, own), self._weighted_pass)

    def _by_layer(self, precision: str | None) -> tuple[Tensor, Tensor]:
        return self._without_absent(*self._computed)

    def combined(self, weights: Tensor, groups: Groups | None) -> list[Tensor | None]:
        by_sample = self._samples.weights(self._present(weights))
        if groups is None:
            return list(self._weighted_pass(by_sample, [layer.parameter for layer in self._layers]))
        combined: list[Tensor | None] = [None] * len(self._layers)
        of_layers = groups.at(self.places())
        for group in sorted(set(of_layers)):
            chosen = [i for i, of in enumerate(of_layers) if of == group]
            parameters = [self._layers[i].parameter for i in chosen]
            for i, gradient in zip(chosen, self._weighted_pass(by_sample[group], parameters), strict=True):
                combined[i] = gradient
        return combined

    def norms(self, order: int, groups: Groups | None) -> Tensor:
        if order == 2:
            return super().norms(order, groups)
        raise TypeError("norms: expected norms of order 2, but memory_budget drops the rows before others are known")
