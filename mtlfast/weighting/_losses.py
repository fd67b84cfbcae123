"""Checks losses, task indices and feedback, and brings every form that users give them in to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mtlfast._numbers import plain

Losses: TypeAlias = Iterable[Tensor | None] | Mapping[Any, Tensor | None] | Tensor
Feedback: TypeAlias = Iterable[Tensor | float | None] | Mapping[Any, Tensor | float | None] | Tensor


def present_losses(who: str, losses: Losses) -> tuple[Tensor, tuple[int, ...], int]:
    """The losses [K] that are not None, their places, and the number of places.

    Raises:
        ValueError: `losses` is not a list, dict or tensor of scalar tensors, or every loss is None.
    """
    if isinstance(losses, Tensor):
        values = _one_dimensional(who, "losses", losses)
        places, number = tuple(range(len(losses))), len(losses)
    else:
        everything = _listed(who, "losses", losses)
        some = {k: loss for k, loss in enumerate(everything) if loss is not None}
        for k, loss in some.items():
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"{who}: loss {k} {_what(loss)}, expected a scalar Tensor or None")
        _some_present(who, "losses", len(some), len(everything))
        values = torch.stack([loss.reshape(()) for loss in some.values()])
        places, number = tuple(some), len(everything)
    return _real(who, "losses", values), places, number


def present_numbers(who: str, name: str, given: Feedback) -> tuple[Tensor, tuple[int, ...], int]:
    """The same for feedback, as float64 without a graph. It may hold numbers as well as tensors."""
    if isinstance(given, Tensor):
        values = _one_dimensional(who, name, given)
        places, number = tuple(range(len(given))), len(given)
    else:
        everything = _listed(who, name, given)
        some = {k: entry if isinstance(entry, Tensor) else plain(entry) for k, entry in enumerate(everything)}
        some = {k: entry for k, entry in some.items() if entry is not None}
        for k, entry in some.items():
            number_itself = isinstance(entry, (int, float)) and not isinstance(entry, bool)
            if not number_itself and not (isinstance(entry, Tensor) and entry.numel() == 1):
                raise ValueError(
                    f"{who}: entry {k} of {name} {_what(entry)}, expected a number, a scalar Tensor or None"
                )
        _some_present(who, name, len(some), len(everything))
        device = next((entry.device for entry in some.values() if isinstance(entry, Tensor)), None)
        entries = [_scalar(entry, device) for entry in some.values()]
        values, places, number = torch.stack(entries), tuple(some), len(everything)
    return _real(who, name, values.detach()).double(), places, number


def task_indices(who: str, tasks: Iterable[int]) -> tuple[int, ...]:
    """The tasks' indices as Python integers.

    Raises:
        ValueError: an entry is not an index of at least 0, or is there twice.
    """
    try:
        present = tuple(plain(task) for task in tasks)
    except TypeError:
        raise ValueError(f"{who}: tasks is {tasks!r}, expected the present tasks' indices") from None
    for place, task in enumerate(present):
        if not isinstance(task, int) or isinstance(task, bool) or task < 0:
            raise ValueError(f"{who}: got task {task!r}, expected an index of at least 0")
        if task in present[:place]:
            raise ValueError(f"{who}: got task {task} twice, expected each index once")
    return present


def _listed(who: str, name: str, given: Any) -> list[Any]:
    try:
        return list(given.values() if isinstance(given, Mapping) else given)
    except TypeError:
        raise ValueError(
            f"{who}: {name} is a {type(given).__name__}, expected a list, a dict or a tensor [K] of them"
        ) from None


def _one_dimensional(who: str, name: str, given: Tensor) -> Tensor:
    if given.dim() != 1:
        raise ValueError(f"{who}: {name} is a tensor of shape {list(given.shape)}, expected [K] or a list")
    _some_present(who, name, len(given), len(given))
    return given


def _some_present(who: str, name: str, present: int, number: int) -> None:
    if present == 0:
        raise ValueError(f"{who}: got {number} {name}, none of them present, expected at least one")


def _real(who: str, name: str, values: Tensor) -> Tensor:
    """The values as floating-point numbers. Integers are converted; other dtypes raise."""
    if values.is_floating_point():
        return values
    if values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"{who}: {name} are {str(values.dtype).removeprefix('torch.')}, expected real numbers")
    return values.to(torch.get_default_dtype())


def _scalar(entry: Tensor | float, device: torch.device | None) -> Tensor:
    if isinstance(entry, Tensor):
        return _real("", "", entry.detach()).reshape(()).double()
    return torch.tensor(entry, dtype=torch.float64, device=device)


def _what(entry: object) -> str:
    return f"has shape {list(entry.shape)}" if isinstance(entry, Tensor) else f"is a {type(entry).__name__}"
