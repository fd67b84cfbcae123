"""`python -m mtlfast methods`: what there is to choose from."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtlfast import _terminal, aggregation, weighting
from mtlfast.aggregation import Aggregator, Reads
from mtlfast.weighting import LossWeighting

READS = {
    Reads.NOTHING: "1 read",
    Reads.NORMS: "2 reads, one for the norms alone",
    Reads.GRAM: "2 reads",
    Reads.EXACT_GRAM: "2 reads",
    Reads.CROSS_GRAM: "2 reads",
    Reads.ROWS: "1 read",
    Reads.STATE: "2 reads of gradients and state",
}
AGGREGATORS = (
    "Aggregators (mtlfast.aggregation) make one update direction of the task gradients. A read is one pass over all "
    "task gradients; on large models reads are most of a method's cost. K is the number of tasks in a step, n that of "
    "all tasks."
)
WEIGHTINGS = (
    "Loss weightings (mtlfast.weighting) make one weighted loss of the task losses, alone or before an aggregator: "
    "mtlfast.backward(losses, aggregator, weighting=...). They read no gradients, but for those that say so."
)
Method = type[Aggregator] | type[LossWeighting]


def listing() -> str:
    """Every method under its family, in the order of `FAMILIES`: aggregators, then loss weightings.

    A method takes one line if the terminal has room for all of them in columns, otherwise two or more.
    """
    return "\n".join(
        [
            *_section(AGGREGATORS, aggregation.FAMILIES),
            "",
            *_section(WEIGHTINGS, weighting.FAMILIES),
            "",
            _terminal.hanging("", "More about one: python -c 'import mtlfast; help(mtlfast.aggregation.PCGrad)'"),
        ]
    )


def _section(introduction: str, families: Mapping[str, Mapping[Any, str]]) -> Iterator[str]:
    yield _terminal.hanging("", introduction)
    summaries = {method: summary for methods in families.values() for method, summary in methods.items()}
    name_width = max(len(method.__name__) for method in summaries)
    summary_width = max(map(len, summaries.values()))
    heads = {method: f"  {method.__name__:<{name_width}}  " for method in summaries}
    entries = {m: f"{heads[m]}{summary:<{summary_width}}  {_note(m)}".rstrip() for m, summary in summaries.items()}
    if max(map(len, entries.values())) > _terminal.width():
        entries = {method: _on_lines(heads[method], summary, _note(method)) for method, summary in summaries.items()}
    for family, methods in families.items():
        yield f"\n{family}"
        yield from (entries[method] for method in methods)


def _on_lines(head: str, summary: str, note: str) -> str:
    lines = [_terminal.hanging(head, summary), _terminal.hanging(" " * len(head), note)]
    return "\n".join(filter(None, lines))


def _note(method: Method) -> str:
    """The method's paper, its state, and for an aggregator how often it reads the task gradients."""
    state = f"keeps {method.keeps}" if method.keeps else ""
    return "; ".join(filter(None, [method.paper, state, _reads(method)]))


def _reads(method: Method) -> str:
    if issubclass(method, LossWeighting):
        return "1 read for the norms" if method.reads_norms else ""
    reads = method.reads
    return READS[reads] if isinstance(reads, Reads) else "its methods' reads"  # a wrapper's is a property
