"""Checks vectors that users give, such as preferences, bounds and sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mtlfast._numbers import is_finite, plain, shown

# The forms in which a user may give a vector.
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
    """A copy of the user's vector as float64 [n], detached. That of a tensor is on the tensor's device.

    Args:
        owner: the object that has the argument, or its name, for the error.
        name: the argument's name.
        value: a tensor, a numpy array, a list or another sequence of numbers.
        length: n, how many entries there must be. None: any number above 0.
        size: what the error calls n if there is no `length`.
        least: the lower bound of every entry.
        least_itself: whether an entry may be equal to `least`.
        not_all_zero: whether to refuse a vector of zeros.

    Raises:
        ValueError: `value` is not a vector of so many finite real numbers in that range.
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
    if not bool(right.all()) or (not_all_zero and not bool(numbers.any())):  # host: only when the vector is given
        raise ValueError(f"{who}: {name} is {shown(value)}, expected {expected}")
    return numbers


def _numbers(value: Any) -> Tensor | None:
    """The entries as a new float64 tensor; None if one is not a real number."""
    if isinstance(value, Tensor):
        real = value.dtype != torch.bool and not value.dtype.is_complex
        return value.detach().to(torch.float64, copy=True) if real else None
    if isinstance(value, (str, bytes, dict, set, frozenset)):
        return None
    try:
        entries = [plain(entry) for entry in value]
    except TypeError:  # a number, or None
        return None
    # The caller refuses inf and NaN. An integer that no float can hold is refused here.
    real = all(is_finite(entry) or isinstance(entry, float) for entry in entries)
    return torch.tensor(entries, dtype=torch.float64) if real else None
