"""The benchmark's tables in a terminal, drawn with rich."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from mtlfast.bench.section import Section

WIDE = 150  # characters that the widest table takes with its quartiles


def progress(cases: Sequence[Any]) -> Iterable[Any]:
    """The cases one after another, under a bar that shows how many are done."""
    return track(cases, "each op", transient=True, disable=not Console().is_terminal)


def show(facts: dict[str, Any], sections: Iterable[Section], spread_of: str = "quartiles") -> None:
    """Prints what holds for all tables, and then each as soon as it is measured.

    Args:
        facts: what `run.facts_of_run` returns.
        sections: the tables.
        spread_of: what the outer two numbers of a cell of three are.
    """
    console = Console(highlight=False)
    spread = console.width >= WIDE
    console.print(f"torch {facts['torch']}, {facts['threads']} threads, {facts['kernels']} kernels.")
    console.print(
        "K is the number of tasks, P the number of elements of one task's gradient. Times are medians of "
        f"{facts['rounds']} rounds, in each of which everything that a row compares runs once. "
        + (f"In brackets are {spread_of}." if spread else f"In {WIDE} columns {spread_of} are shown too.")
    )
    for section in sections:
        if section.rows:
            console.print(f"\n\n[bold]{section.title}[/bold]")
            console.print(_table(section, spread), crop=False)  # in a terminal too narrow for it, nothing is lost
            console.print(f"\n{section.caption}", markup=False)


def _table(section: Section, spread: bool) -> Table:
    """The section's rows, with quartiles if `spread`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, int(spread), 0, 0), pad_edge=False, show_edge=False)
    columns: dict[str, list[Text]] = {}
    for column in dict.fromkeys(column for row in section.rows for column in row):
        values = [row.get(column) for row in section.rows]
        columns[column] = [_cell(value, spread) for value in values]
        # As narrow as its cells and the longest word of its heading: rich would cut words to make room.
        width = max(*map(len, column.split()), *map(len, columns[column]))
        words = any(isinstance(value, str) for value in values)
        table.add_column(textwrap.fill(column, width), justify="left" if words else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _cell(value: Any, spread: bool) -> Text:
    if isinstance(value, list):
        low, middle, high = map(_number, value)
        return Text.assemble(middle, (f" ({low}-{high})", "dim")) if spread else Text(middle)
    return Text(_number(value) if isinstance(value, float) else "" if value is None else str(value))


def _number(value: float) -> str:
    """Three digits that count, or all digits before the point."""
    return f"{value:.0f}" if abs(value) >= 20 else f"{value:.3g}"
