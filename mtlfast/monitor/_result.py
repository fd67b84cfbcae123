"""What the monitor asks of the result of a step, and the check that it is one."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor


class Result(Protocol):
    """The part of a `mtlfast.StepResult` that the monitor reads."""

    @property
    def losses(self) -> Tensor:
        """[K]."""

    @property
    def tasks(self) -> tuple[int, ...]:
        """The K present tasks' indices."""

    @property
    def weights(self) -> Tensor | None:
        """[K], or [G, K] with groups; None if the method has none."""

    @property
    def gram(self) -> Tensor | None:
        """[K, K], or [G, K, K] with groups; None if it was not computed."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """The K present tasks' names, if they have any."""

    @property
    def groups(self) -> tuple[str, ...] | None:
        """The names of the G groups of parameters, if there are any."""


ASKED = tuple(name for name in vars(Result) if not name.startswith("_"))


def gram_of(caller: str, result: object) -> tuple[Result, Tensor]:
    """The result, and its Gram matrix.

    Raises:
        TypeError: it is not the result of a step.
        ValueError: it has no Gram matrix.
    """
    if not all(hasattr(result, name) for name in ASKED):
        raise TypeError(f"{caller}: got a {type(result).__name__}, expected the StepResult of mtlfast.backward")
    known = cast(Result, result)
    if known.gram is None:
        raise ValueError(
            f"{caller}: the result has no Gram matrix, expected one: pass diagnostics=True to mtlfast.backward"
        )
    return known, known.gram
