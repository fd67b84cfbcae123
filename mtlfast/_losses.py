"""Brings the losses of a step, given as tensors or as closures, to one form."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

Closure = Callable[[], Tensor]
Losses = Mapping[str, Tensor | None] | Mapping[str, Closure | None] | Iterable[Tensor | Closure | None] | Tensor


class Present(NamedTuple):
    """The tasks that are present in one step. Either `losses` or `closures` has an entry for each of them.

    Attributes:
        number: the number of all tasks, present or not.
        tasks: the indices of the present tasks.
        names: the present tasks' names as the user gave them in a dict; None if the losses came without names.
        labels: what errors call the present tasks' losses.
        losses: the losses without dimensions.
        closures: the functions that compute the losses.
    """

    number: int
    tasks: tuple[int, ...]
    names: tuple[str, ...] | None
    labels: list[str]
    losses: list[Tensor]
    closures: list[Closure]

    @property
    def places(self) -> tuple[int, ...] | None:
        """The indices of the present tasks, or None if all are present."""
        return None if len(self.tasks) == self.number else self.tasks


def present_losses(
    losses: Losses,
    caller: str = "backward",
    what: str = "loss",
    may_be_absent: bool = True,
    may_be_closures: bool = False,
) -> Present:
    """The present tasks, from any form that losses may have. `what` is what the caller's errors call a loss.

    Raises:
        ValueError, TypeError: an entry does not fit, no task is present, or tensors and closures are mixed.
    """
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    named = _named(losses, caller, plural)
    kept = {k: (name, loss) for k, (name, loss) in enumerate(named.items()) if loss is not None or not may_be_absent}
    or_none = " or None" if may_be_absent else ""
    labels: list[str] = []
    values: list[Tensor] = []
    closures: list[Closure] = []
    for name, loss in kept.values():
        label = f"{what} {name}"
        labels.append(label)
        if may_be_closures and callable(loss):
            closures.append(loss)
        else:
            values.append(scalar(loss, caller, label, or_none))
        if values and closures:
            kinds = "a function and a tensor" if callable(kept[next(iter(kept))][1]) else "a tensor and a function"
            raise TypeError(f"{caller}: {labels[0]} and {label} are {kinds}, expected one kind for all")
    if not kept and not may_be_absent:
        raise ValueError(f"{caller}: got no {plural}, expected at least one")
    if not kept:
        raise ValueError(f"{caller}: got {len(named)} {plural}, none of them present, expected at least one")
    names = tuple(str(name) for name, _ in kept.values()) if isinstance(losses, Mapping) else None
    return Present(len(named), tuple(kept), names, labels, values, closures)


def scalar(loss: object, caller: str, label: str, or_none: str = "") -> Tensor:
    """The loss without dimensions.

    Args:
        loss: what the user gave.
        caller: the name that the error begins with.
        label: what the error calls the loss.
        or_none: " or None" if the task could have been absent instead.

    Raises:
        ValueError, TypeError: it is not a real scalar that depends on parameters.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"{caller}: {label} is a {type(loss).__name__}, expected a scalar Tensor{or_none}")
    if loss.numel() != 1:
        raise ValueError(f"{caller}: {label} has shape {list(loss.shape)}, expected a scalar")
    if loss.is_complex():
        raise TypeError(f"{caller}: {label} has dtype {loss.dtype}, expected a real one")
    if not loss.requires_grad:
        absent = ", or None for a task that is absent" if or_none else ""
        raise ValueError(f"{caller}: {label} does not require grad, expected one that depends on parameters{absent}")
    return loss.reshape(()) if loss.dim() else loss


def _named(losses: Losses, caller: str, plural: str) -> dict[Hashable, object]:
    """The entries by name or place."""
    if isinstance(losses, Tensor) and losses.dim() != 1:
        raise ValueError(
            f"{caller}: {plural} is a tensor of shape {list(losses.shape)}, expected [K] or a list of scalars"
        )
    if isinstance(losses, Mapping):
        return dict(losses.items())
    try:
        entries = iter(losses)
    except TypeError:
        raise TypeError(f"{caller}: {plural} is a {type(losses).__name__}, expected a list of scalars") from None
    return dict(enumerate(entries))  # an error inside a generator is the user's
