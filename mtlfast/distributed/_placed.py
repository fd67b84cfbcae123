"""DTensors: each rank holds the part of a gradient that the placements of its parameter say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mtlfast._shards import Shards
from mtlfast.distributed._ranks import Ranks
from mtlfast.distributed._reduction import Kind
from mtlfast.distributed._stand_ins import stand_in


class Placed:
    """Gradients that are reduced and sharded already, as FSDP2 leaves them.

    Products are summed over those dimensions of a parameter's mesh in which it is sharded. In the other dimensions it
    is replicated, and all ranks there have the same products.

    Args:
        parameters: the shared parameters.
        storage_dtype: the dtype in which the gradients are kept; None: their own.
    """

    def __init__(self, parameters: Sequence[Tensor], storage_dtype: torch.dtype | None = None) -> None:
        self._parameters: Sequence[Any] = parameters
        self._dtype = storage_dtype
        self._rows: list[list[Tensor | None]] = []

    def start(self, label: str, gradients: Sequence[Tensor | None]) -> None:
        row = [
            torch.zeros_like(p.to_local(), requires_grad=False) if g is None else g
            for p, g in zip(self._parameters, gradients, strict=True)
        ]
        self._rows.append([g if self._dtype is None else g.to(self._dtype) for g in row])

    def rows(self) -> list[list[Tensor | None]]:
        rows, self._rows = self._rows, []
        return rows

    def stand_ins(self) -> list[Tensor]:
        return [stand_in(p, p.to_local().shape, tuple(p.device_mesh.get_coordinate())) for p in self._parameters]

    def kinds(self) -> list[Kind]:
        columns: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for t, parameter in enumerate(self._parameters):
            columns.setdefault((parameter.device_mesh, sharded_dimensions(parameter)), []).append(t)
        return [Kind(places, partial(_total, *kind)) for kind, places in columns.items()]

    def shards(self, reached: Sequence[bool]) -> Shards:
        return Parts(self._parameters, reached)

    def whole(self, direction: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if x is None else as_placed(x, p) for x, p in zip(direction, self._parameters, strict=True)]


class Parts(Shards):
    """The parts that this rank holds, for methods that work element by element."""

    def __init__(self, parameters: Sequence[Any], reached: Sequence[bool]) -> None:
        self._parameters = parameters
        self._first = []
        self._numel = 0
        for parameter, there in zip(parameters, reached, strict=True):
            self._first.append(self._numel)
            self._numel += parameter.numel() if there else 0

    @property
    def numel(self) -> int:
        return self._numel

    def total(self, values: Tensor) -> Tensor:
        first = self._parameters[0]  # there is one kind of placement
        return _total(first.device_mesh, sharded_dimensions(first), "the sum of the products", values.contiguous())

    def indices(self, t: int) -> Tensor:
        parameter = self._parameters[t]
        count = torch.arange(parameter.numel(), device=parameter.device) + self._first[t]
        return self._own(t, count.view(parameter.shape))

    def own(self, t: int, whole: Tensor) -> Tensor | None:
        parameter = self._parameters[t]
        if whole.numel() != parameter.numel():
            return None
        return self._own(t, whole.to(parameter.device).reshape(parameter.shape)).clone()

    def saved(self, t: int, own: Tensor) -> Tensor:
        return as_placed(own, self._parameters[t])

    def _own(self, t: int, whole: Tensor) -> Tensor:
        parameter = self._parameters[t]
        placed: Any = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        own: Tensor = placed.to_local()
        return own


def sharded_dimensions(parameter: Any) -> tuple[int, ...]:
    """The dimensions of a parameter's mesh in which it is sharded."""
    return tuple(i for i, placement in enumerate(parameter.placements) if not placement.is_replicate())


def as_placed(own: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a tensor as the DTensor with the placements of a parameter."""
    placed: Tensor = DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return placed


def _total(mesh: Any, dimensions: Sequence[int], what: str, values: Tensor) -> Tensor:
    for dimension in dimensions:
        Ranks(mesh.get_group(dimension)).sum(what, values)
    return values
