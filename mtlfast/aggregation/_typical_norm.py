"""A norm that represents the norms of all task gradients: their mean, their median, one task's, ..."""

from __future__ import annotations

from typing import Any

from mtlfast._numbers import plain
from mtlfast._settings import Setting, Whole
from mtlfast.aggregation._step import Step, check_one_of_all

NAMES = ("mean", "geometric", "harmonic", "min", "max", "median")  # as TypicalNorm in csrc/solve/norms.h


class TypicalNorm(Setting["str | int"]):
    """A setting that holds the name of such a norm, the index of the task whose norm it is, or a name of `others`."""

    def __init__(self, *others: str) -> None:
        self.names = (*others, *NAMES)
        self.expected = f"{', '.join(map(repr, self.names))} or a task's index"

    def holds(self, value: Any) -> bool:
        value = plain(value)
        return value in self.names if isinstance(value, str) else Whole(0).holds(value)


def check_typical_norm(owner: object, name: str | int, step: Step) -> None:
    """Raises if `name` is the index of a task that does not exist."""
    if isinstance(name, int):
        check_one_of_all(type(owner).__name__, name, step)


def typical_norm(name: str | int) -> tuple[float, float]:
    """The solver's two constants for a name: which norm it is, and for a task's norm which task.

    If that task is absent, the solver takes the first present one.
    """
    if not isinstance(name, int):
        return float(NAMES.index(name)) if name in NAMES else -1.0, 0.0
    return float(len(NAMES)), float(name)
