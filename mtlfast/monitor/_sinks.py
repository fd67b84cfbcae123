"""Where a monitor's numbers can be written: TensorBoard, a file of JSON lines, Weights & Biases."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from mtlfast.monitor._reading import Reading
from mtlfast.monitor._statistics import Statistics
from mtlfast.monitor._steps import Steps

Sink: TypeAlias = Any  # a path, or an object with `add_scalar` or `log`
Writer: TypeAlias = Callable[[Mapping[str, float], int], None]
FOR_ALL = ("loss/", "steps not finite")  # what a group has not of its own


def writer_of(caller: str, sink: Sink) -> Writer:
    """The function that writes to the sink.

    Raises:
        TypeError: it is no sink.
    """
    if isinstance(sink, (str, os.PathLike)):
        return lambda values, step: _add_line(sink, values, step)
    if callable(getattr(sink, "add_scalar", None)):
        return lambda values, step: _add_scalars(sink, values, step)
    if callable(getattr(sink, "log", None)):
        return lambda values, step: sink.log(dict(values), step=step)
    raise TypeError(
        f"{caller}: sink is a {type(sink).__name__}, expected a SummaryWriter, the path of a file, or an object with "
        "log(dict, step=)"
    )


def _add_scalars(sink: Sink, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        sink.add_scalar(name, value, step)


def _add_line(path: str | os.PathLike[str], values: Mapping[str, float], step: int) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


class Waiting(NamedTuple):
    """Numbers that are on their way to the host, and where they go from there.

    Attributes:
        sink: where to.
        step: the step to write them at.
        names: the tasks' names.
        groups: the names of the groups to write as well.
        seen: how many steps the monitor had been given.
        reading: the numbers.
    """

    sink: Sink
    step: int
    names: tuple[str, ...]
    groups: tuple[str, ...]
    seen: int
    reading: Reading

    def write(self, caller: str) -> None:
        """Writes them. It waits until they have arrived."""
        rings = self.reading.wait().in_order(self.seen)
        values = Statistics.of(Steps.of(rings), self.names).scalars()
        for i, group in enumerate(self.groups):
            of_group = Statistics.of(Steps.of(rings, i), self.names).scalars()
            values |= {f"{group}/{name}": of_group[name] for name in of_group if not name.startswith(FOR_ALL)}
        writer_of(caller, self.sink)(values, self.step)
