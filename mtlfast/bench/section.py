"""One table of the benchmark: rows as data for --json, and as a person reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

WIDE = 150  # characters that the widest table takes with its quartiles


@dataclass
class Section:
    """A table; a cell that is a list of three numbers is (quartile, median, quartile).

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

    def table(self, width: int) -> Table:
        """The section as a table to print, with quartiles where `width` characters have room for them."""
        table = Table(title=self.title, caption=self.caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.title_justify = table.caption_justify = "left"
        for column, value in self.rows[0].items() if self.rows else ():
            words = isinstance(value, str)
            table.add_column(column, justify="left" if words else "right", no_wrap=words)
        for row in self.rows:
            table.add_row(*(_cell(value, spread=width >= WIDE) for value in row.values()))
        return table


def _cell(value: Any, spread: bool) -> str:
    if isinstance(value, list):
        low, middle, high = map(_number, value)
        return f"{middle} [dim]({low}-{high})[/dim]" if spread else middle
    return _number(value) if isinstance(value, float) else "" if value is None else str(value)


def _number(value: float) -> str:
    """Three digits that count, or all digits before the point."""
    return f"{value:.0f}" if abs(value) >= 20 else f"{value:.3g}"
