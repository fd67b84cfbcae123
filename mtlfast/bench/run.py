"""Runs the rows of the benchmark and shows them."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtlfast import _native
from mtlfast.bench import baselines, peers
from mtlfast.bench.contests import contests_on
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered


def _rows(elements: int, rounds: int, quick: bool, progress: bool) -> Iterator[dict[str, Any]]:
    """One dict an op, K and dtype."""
    tasks = (2, 8) if quick else (2, 4, 8, 16)
    cases = [(K, torch.float32) for K in tasks] + [(8, torch.bfloat16)]
    for K, dtype in track(cases, "timing", disable=not progress, transient=True):
        grads = scattered(K, elements, dtype)
        nbytes = K * elements * dtype.itemsize
        contests = contests_on(grads)
        read = baselines.read_stream(grads)
        turns: dict[str, Callable[[], object]] = {"read": read}
        for name, contest in contests.items():
            turns[name], turns[f"plain {name}"] = contest.native, contest.plain
        times = take_turns(turns, rounds)
        for name, contest in contests.items():
            percent = times["read"].ratio_to(times[name])
            yield {
                "op": name,
                "K": K,
                "dtype": str(dtype).removeprefix("torch."),
                "elements": elements,
                "ms": times[name].median * 1e3,
                "GB/s": contest.passes * nbytes / times[name].median / 1e9,
                "read GB/s": nbytes / times["read"].median / 1e9,
                "% of read bandwidth": [100 * contest.passes * p for p in percent],
                "plain ms": times[f"plain {name}"].median * 1e3,
                "times faster than plain": list(times[f"plain {name}"].ratio_to(times[name])),
            }


def run_bench(elements: int, rounds: int, quick: bool, as_json: bool) -> None:
    """Times every op and prints a table, or one JSON object.

    Args:
        elements: P, elements of one task's gradient.
        rounds: alternating rounds.
        quick: fewer rows.
        as_json: print JSON.
    """
    rows = list(_rows(elements, rounds, quick, progress=not as_json))
    against = list(peers.compare(elements, rounds)) if peers.installed() else []
    native = _native.C
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": native.isa() if native else "reference",
        "rounds": rounds,
        "build": _native.build_facts(),
    }
    if as_json:
        print(json.dumps({"facts": facts, "rows": rows, "peers": against}, indent=1))
        return
    console = Console()
    table = Table(
        title=f"{elements / 1e6:g}M elements over 150 tensors, {facts['threads']} threads, {facts['kernels']} kernels",
        caption=f"Medians of {rounds} alternating rounds, quartiles in brackets. 100 %: the bytes that the op must "
        "read and write, at the speed of torch.sum in the same rounds.",
    )
    for column in (
        "op",
        "K",
        "dtype",
        "ms",
        "GB/s",
        "% of read bandwidth",
        "plain PyTorch, ms",
        "times faster",
    ):
        table.add_column(column, justify="left" if column in ("op", "dtype") else "right")
    for row in rows:
        table.add_row(
            row["op"],
            str(row["K"]),
            row["dtype"],
            f"{row['ms']:.1f}",
            f"{row['GB/s']:.1f}",
            _spread(row["% of read bandwidth"], ".0f"),
            f"{row['plain ms']:.0f}",
            _spread(row["times faster than plain"], ".1f"),
            end_section=row["op"] == "PCGrad",
        )
    console.print(table)
    if against:
        console.print(_peers_table(against, rounds))


def _peers_table(rows: list[dict[str, Any]], rounds: int) -> Table:
    table = Table(
        title="A whole PCGrad step, from the task gradients to .grad, beside TorchJD",
        caption=f"Medians of {rounds} alternating rounds, quartiles in brackets. The floor: reading the K gradients "
        "twice and writing one, at the speed of torch.sum.",
    )
    columns = (
        "K",
        "mtlfast, ms",
        "of the floor",
        "TorchJD, Gramian",
        "times faster",
        "TorchJD, default",
        "times faster",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['ms']['mtlfast']:.1f}", _spread(row["floors"], ".2f")]
        for name in ("TorchJD, Gramian", "TorchJD, default"):
            cells += [f"{row['ms'][name]:.0f} ms", _spread(row["times faster"][name], ".1f")]
        table.add_row(str(row["K"]), *cells)
    return table


def _spread(quartiles: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in quartiles)
    return f"{middle} [dim]({low}-{high})[/dim]"
