"""One table of the benchmark as data: what --json prints, and `tables.py` draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Section:
    """A table; a cell of three numbers is [low, median, high], by quartiles or by a confidence interval.

    Attributes:
        name: its key in the JSON object.
        title: what one sees.
        caption: how to read it.
        rows: column -> value.
    """

    name: str
    title: str
    caption: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)
