"""Vectors that users give: preferences, bounds, sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mtlfast._numbers import is_finite, plain, shown

# What stands for a vector where a user gives one.
Vector: TypeAlias = Tensor | Sequence[float]


def vector(
    owner: object,
    name: str,
    value: Any,
    *,
    length: int | None = None,
    size: str = "n",
    least: float = -math.inf,
    least_itself: bool = True,
    not_all_zero: bool = False,
) -> Tensor:
    """A copy of what the user gave, float64 [n], detached; a tensor's stays on its device.

    Args:
        owner: whose argument it is, an object or its name, for the error.
        name: the argument's name.
        value: a tensor, a numpy array, a list or another sequence of numbers.
        length: n; None: any above 0.
        size: what the error calls n where there is no `length`.
        least: what every entry must be at least, or above without `least_itself`.
        least_itself: whether an entry may be `least`.
        not_all_zero: refuse zeros alone.

    Raises:
        ValueError: it is no vector of so many finite real numbers in that range.
    """
    who = owner if isinstance(owner, str) else type(owner).__name__
    n = size if length is None else str(length)
    expected = f"{n} finite numbers"
    if least > -math.inf:
        expected += f" {'of at least' if least_itself else 'above'} {least:g}"
    if not_all_zero:
        expected += ", not all 0"
    if isinstance(value, Tensor) and value.dim() != 1:
        raise ValueError(f"{who}: {name} has shape {list(value.shape)}, expected [{n}]")
    numbers = _numbers(value)
    if numbers is None or len(numbers) == 0:
        raise ValueError(f"{who}: {name} is {shown(value)}, expected {expected}")
    if length is not None and len(numbers) != length:
        raise ValueError(f"{who}: {name} has shape [{len(numbers)}], expected [{n}]")
    right = numbers.isfinite() & ((numbers >= least) if least_itself else (numbers > least))
    if not bool(right.all()) or (not_all_zero and not bool(numbers.any())):  # host: once, when it is given
        raise ValueError(f"{who}: {name} is {shown(value)}, expected {expected}")
    return numbers


def _numbers(value: Any) -> Tensor | None:
    """Float64 of its own; None if it holds anything but real numbers."""
    if isinstance(value, Tensor):
        real = value.dtype != torch.bool and not value.dtype.is_complex
        return value.detach().to(torch.float64, copy=True) if real else None
    if isinstance(value, (str, bytes, dict, set, frozenset)):
        return None
    try:
        entries = [plain(entry) for entry in value]
    except TypeError:  # a number, or None
        return None
    # What is not finite is refused by the caller; an integer that no float can hold is refused here.
    real = all(is_finite(entry) or isinstance(entry, float) for entry in entries)
    return torch.tensor(entries, dtype=torch.float64) if real else None
