"""`ParameterState`: tensors that a method keeps from step to step for each parameter, and by task."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlfast._layout import same_layout
from mtlfast._shards import Shards
from mtlfast.task_gradients import TaskGradients

Key = tuple[str, int]  # what a tensor is, such as "mean", and the task that it belongs to
SAVED = re.compile(r"([a-z]+)\.(\d+)\.(\d+)")  # the name of a saved tensor: its key and its parameter's position


def outside_inference() -> AbstractContextManager[object]:
    """Within it tensors are made that outlive a step under inference mode. A compiled function cannot enter it."""
    compiling = torch.compiler.is_compiling()
    return nullcontext() if compiling else torch.inference_mode(False)


class Column:
    """What is kept for one parameter.

    Attributes:
        parameter: the parameter; None if it is known by its position alone.
        tensors: its tensors by what they are and by task, with the shape of the parameter or of this rank's part.
        part_of: what knows that part, and the parameter's place there; None if the tensors are whole.
        active: whether the last step's gradients had this parameter among their columns.
    """

    __slots__ = ("active", "parameter", "part_of", "tensors")

    def __init__(self, parameter: Tensor | None = None) -> None:
        self.parameter, self.active = parameter, True
        self.part_of: tuple[Shards, int] | None = None
        self.tensors: dict[Key, Tensor] = {}


class Places(NamedTuple):
    """Where the tensors of one step's gradients belong. Nothing has changed before `ParameterState.commit`.

    Attributes:
        columns: T columns, one for each tensor of the gradients.
        parameters: the T parameters, if they are known.
        order: all columns, in the order that they have from this step on.
        made: tensors that are new in this step.
        shards: what knows which part of each parameter this rank holds; None if it holds all.
    """

    columns: list[Column]
    parameters: Sequence[Tensor] | None
    order: list[Column]
    made: list[tuple[Column, Key, Tensor]]
    shards: Shards | None


class ParameterState:
    """Tensors for each parameter and task, with the gradients' strides, that stay with their parameter.

    A parameter is recognised as the same tensor. Where the parameters are not known, as in a call on a matrix, after
    loading and in a copy, the state belongs to the gradients' tensors by their position. Then their number and their
    shapes must be those of the state.
    """

    def __init__(self) -> None:
        self._columns: list[Column] = []

    def dtype(self, what: str) -> torch.dtype | None:
        """The dtype of the tensors that are called so; None if there are none."""
        return next((x.dtype for c in self._columns for (name, _), x in c.tensors.items() if name == what), None)

    def places(self, caller: str, grads: TaskGradients) -> Places:
        """Where the gradients' tensors belong.

        Raises:
            ValueError: the gradients do not fit the state.
        """
        columns = self._known(caller, grads)
        shapes = grads.shapes if grads.parameters is None else [parameter.shape for parameter in grads.parameters]
        for t, (column, shape) in enumerate(zip(columns, shapes, strict=True)):
            _fit_part(column, t, shape, grads)
            kept = next(iter(column.tensors.values()), None)
            if shape is not None and kept is not None and kept.shape != shape:
                raise ValueError(
                    f"{caller}: tensor {t} has shape {list(shape)}, expected {list(kept.shape)} as its state has "
                    "(reset() forgets it)"
                )
        return Places(columns, grads.parameters, self._ordered(columns), [], grads.shards)

    def _known(self, caller: str, grads: TaskGradients) -> list[Column]:
        """A column for each of the gradients' tensors, of which some may be new."""
        parameters, count = grads.parameters, len(grads.shapes)
        if parameters is None:
            for some in ([column for column in self._columns if column.active], self._columns):
                if len(some) == count:
                    return some
            if self._columns:
                raise ValueError(
                    f"{caller}: got {count} tensors, expected {len(self._columns)} as there is state for "
                    "(reset() forgets it)"
                )
            return [Column() for _ in range(count)]
        by_parameter = {id(column.parameter): column for column in self._columns if column.parameter is not None}
        fresh = sum(id(parameter) not in by_parameter for parameter in parameters)
        waiting = [column for column in self._columns if column.parameter is None]
        others: Iterator[Column] = (Column(parameter) for parameter in parameters if id(parameter) not in by_parameter)
        if fresh and waiting:  # loaded or copied: by position
            for some in ([column for column in waiting if column.active], waiting):
                if len(some) == fresh:
                    others = iter(some)
                    break
            else:
                raise ValueError(
                    f"{caller}: got {fresh} parameters after loading, expected {len(waiting)} as the state has; "
                    "freeze the same ones as when it was saved for one step, or forget it by reset()"
                )
        return [by_parameter.get(id(parameter)) or next(others) for parameter in parameters]

    def _ordered(self, columns: list[Column]) -> list[Column]:
        """All columns: the given ones in their order, and each other one behind the one that it stood behind."""
        if len(columns) == len(self._columns) and all(a is b for a, b in zip(columns, self._columns, strict=True)):
            return columns
        order, here = list(columns), {id(column) for column in columns}
        for before, column in zip([None, *self._columns], self._columns, strict=False):
            if id(column) not in here:
                order.insert(0 if before is None else order.index(before) + 1, column)
        return order

    def tensors(
        self, places: Places, key: Key, examples: Sequence[Tensor | None], dtype: torch.dtype, make: bool = True
    ) -> list[Tensor | None]:
        """The T tensors of one key, with the strides and on the device of `examples`; None where there is no example.

        Where there is no tensor yet, it is a new one of zeros with `make`, and otherwise None. A tensor that has other
        strides than its example, as it may after loading, is copied.
        """
        found: list[Tensor | None] = []
        for column, like in zip(places.columns, examples, strict=True):
            kept = None if like is None else column.tensors.get(key)
            if like is not None and (make if kept is None else not _fits(kept, like, dtype)):
                with outside_inference():
                    if kept is None:
                        kept = torch.zeros_like(like, dtype=dtype, requires_grad=False)
                    else:
                        kept = torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(kept)
                places.made.append((column, key, kept))
            found.append(kept)
        return found

    def commit(self, places: Places) -> None:
        """Takes what is new in this step. It cannot fail."""
        for column, key, made in places.made:
            column.tensors[key] = made
        for column in self._columns:
            column.active = False
        for t, column in enumerate(places.columns):
            column.active = True
            column.part_of = None if places.shards is None else (places.shards, t)
        if places.parameters is not None:
            for column, parameter in zip(places.columns, places.parameters, strict=True):
                column.parameter = parameter
        self._columns = places.order

    def apply(self, move: Callable[[Tensor], Tensor]) -> None:
        """Moves all tensors as `nn.Module.to` does, but for their dtype, which they keep."""
        for column in self._columns:
            for key, tensor in column.tensors.items():
                moved = move(tensor)
                column.tensors[key] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    def saved(self) -> dict[str, Tensor]:
        """All tensors by name, and which parameters were active. A part of a parameter is saved as a DTensor."""
        if not self._columns:
            return {}
        found = {"columns": torch.tensor([column.active for column in self._columns])}
        for position, column in enumerate(self._columns):
            for (what, task), tensor in column.tensors.items():
                part_of, tensor = column.part_of, tensor.detach()
                found[f"{what}.{task}.{position}"] = tensor if part_of is None else part_of[0].saved(part_of[1], tensor)
        return found

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Takes copies of what `saved` returned, on the device of the tensors that are here."""
        device = next((x.device for column in self._columns for x in column.tensors.values()), None)
        active = saved.get("columns")
        columns = [] if active is None else [Column() for _ in active]
        if active is not None:
            for column, was in zip(columns, active.tolist(), strict=True):  # host: a loaded state, once
                column.active = was
        for name, tensor in saved.items():
            if (parts := SAVED.fullmatch(name)) is not None:
                what, task, position = parts.groups()
                tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # on all ranks
                copied = torch.empty_like(tensor, device=device).copy_(tensor)
                columns[int(position)].tensors[what, int(task)] = copied
        self._columns = columns

    @staticmethod
    def named(names: Sequence[str], prefix: str) -> list[str]:
        """Those of a state dict's names that `saved` gave, behind a prefix."""
        own = [name for name in names if name.startswith(prefix)]
        return [x for x in own if x[len(prefix) :] == "columns" or SAVED.fullmatch(x[len(prefix) :])]

    def clear(self) -> None:
        """Forgets all."""
        self._columns = []

    def __getstate__(self) -> list[Any]:
        """A copy knows its parameters by position, because copied parameters would be others."""
        return [[(column.tensors, column.active) for column in self._columns]]  # in a list, which is never false

    def __setstate__(self, state: list[Any]) -> None:
        self._columns = []
        for tensors, active in state[0]:
            column = Column()
            column.tensors, column.active = tensors, active
            self._columns.append(column)


def _fit_part(column: Column, t: int, shape: torch.Size | None, grads: TaskGradients) -> None:
    """Brings a column's tensors, if they were saved on another number of ranks, to the part that is wanted here."""
    for key, kept in column.tensors.items():
        if shape is None or kept.shape == shape:
            continue
        if grads.shards is not None:
            part = grads.shards.own(t, kept)
        elif kept.dim() == 1 and kept.numel() == shape.numel():  # saved in the order of memory
            example = grads.examples()[t]
            part = kept.view(shape) if example is None else kept.as_strided(shape, example.stride())
        else:
            part = None
        if part is not None:
            column.tensors[key] = part


def _fits(kept: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels take the tensor beside `like`."""
    return kept.dtype == dtype and kept.device == like.device and same_layout(kept, like.stride())
