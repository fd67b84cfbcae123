"""`python -m mtlfast methods`: what there is to choose from."""

from rich.table import Table

from mtlfast.aggregation import FAMILIES, Aggregator, GramAggregator, Reads

PASSES = {Reads.NOTHING: "1", Reads.NORMS: "2 (norms, sum)", Reads.GRAM: "2"}


def methods_table() -> Table:
    """One row for each method, under its kind, in the order of `mtlfast.aggregation.FAMILIES`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "what it makes of the task gradients", "paper", "state", "reads of K * P"):
        table.add_column(column, no_wrap=column == "name")
    for family, methods in FAMILIES.items():
        table.add_row()
        table.add_row(f"[bold]{family}[/bold]")
        for method, summary in methods.items():
            table.add_row(method.__name__, summary, method.paper, method.keeps, _reads(method))
    return table


def _reads(method: type[Aggregator]) -> str:
    reads = method.reads if issubclass(method, GramAggregator) else None
    return PASSES[reads] if isinstance(reads, Reads) else "theirs"  # a wrapper's is a property
