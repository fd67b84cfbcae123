"""The tasks' names: those that the user gave, and those of the losses of each step."""

from __future__ import annotations

from collections.abc import Sequence

from mtlfast._numbers import shown


def check_names(caller: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: they are not different strings.
    """
    listed = [] if isinstance(names, str) or not hasattr(names, "__iter__") else list(names)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{caller}: names is {shown(names)}, expected a list of the tasks' names")
    for k, name in enumerate(listed):
        if name in listed[:k]:
            raise ValueError(f"{caller}: names has {name!r} twice, expected different names")
    return tuple(listed)


def shown_names(names: Sequence[str | None]) -> tuple[str, ...]:
    """The names, with "task k" in place of None."""
    return tuple(f"task {k}" if name is None else name for k, name in enumerate(names))


def joined_names(
    caller: str, known: Sequence[str | None], all_known: bool, tasks: Sequence[int], names: Sequence[str] | None
) -> list[str | None]:
    """The names of all tasks up to the last of a step, None for one without a name.

    Args:
        caller: what the error begins with.
        known: the names so far.
        all_known: whether there can be no further task.
        tasks: the indices of the tasks of the step.
        names: their names, if the losses came with names.

    Raises:
        ValueError: a task is none of the known ones, or has another name.
    """
    number = max(tasks) + 1
    if all_known and number > len(known):
        raise ValueError(f"{caller}: got task {number - 1}, expected {len(known)} tasks as names says")
    joined = [*known, *[None] * (number - len(known))]
    for task, name in zip(tasks, names or (), strict=bool(names)):
        if joined[task] not in (None, name):
            raise ValueError(f"{caller}: task {task} is named {name!r}, expected {joined[task]!r}")
        if name in joined[:task] or name in joined[task + 1 :]:
            raise ValueError(f"{caller}: task {task} is named {name!r}, as task {joined.index(name)} is")
        joined[task] = name
    return joined
