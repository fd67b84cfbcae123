"""`python -m mtlfast methods`: what there is to choose from."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mtlfast import aggregation, weighting
from mtlfast.aggregation import Aggregator, Reads
from mtlfast.weighting import LossWeighting

PASSES = {
    Reads.NOTHING: "1",
    Reads.NORMS: "2 (norms, sum)",
    Reads.GRAM: "2",
    Reads.EXACT_GRAM: "2",
    Reads.CROSS_GRAM: "2",
    Reads.ROWS: "1 (element-wise)",
}
Method = type[Aggregator] | type[LossWeighting]


def methods_tables() -> list[Table]:
    """One row for each method under its kind, in the order of `FAMILIES`: aggregators, then loss weightings."""
    return [
        _table("what it makes of the task gradients", aggregation.FAMILIES),
        _table("what it makes of the losses", weighting.FAMILIES),
    ]


def _table(what: str, families: Mapping[str, Mapping[Any, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", what, "paper", "state", "reads of K * P"):
        table.add_column(column, no_wrap=column == "name")
    for family, methods in families.items():
        table.add_row()
        table.add_row(f"[bold]{family}[/bold]")
        for method, summary in methods.items():
            table.add_row(method.__name__, summary, method.paper, method.keeps, _reads(method))
    return table


def _reads(method: Method) -> str:
    if issubclass(method, LossWeighting):
        return "0"
    reads = method.reads
    return PASSES[reads] if isinstance(reads, Reads) else "theirs"  # a wrapper's is a property
