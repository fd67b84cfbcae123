"""Runs the rows of the benchmark and shows them."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mtlfast import _native, ops
from mtlfast.aggregation import PCGrad
from mtlfast.bench import baselines
from mtlfast.bench.timing import take_turns
from mtlfast.bench.workload import scattered
from mtlfast.task_gradients import TaskGradients


class Contest(NamedTuple):
    """One op on one workload: the native way, the plain way, and how often J's bytes go over the memory bus."""

    native: Callable[[], object]
    plain: Callable[[], object]
    passes: float  # bytes read and written, over the bytes of J


def _contests(grads: TaskGradients) -> dict[str, Contest]:
    K = grads.num_tasks
    weights = torch.linspace(0.5, 1.5, K, dtype=torch.float64)
    signs = torch.ones(K, dtype=torch.float64).neg()
    pcgrad, out = PCGrad(), ops.combine(grads, weights)
    return {
        "gram": Contest(lambda: ops.gram(grads), baselines.plain_gram(grads), 1),
        "norms": Contest(lambda: ops.norms(grads), baselines.plain_norms(grads), 1),
        "combine": Contest(
            lambda: ops.combine(grads, weights, out=out), baselines.plain_combine(grads, weights), 1 + 1 / K
        ),
        "flatten": Contest(lambda: ops.flatten(grads), baselines.plain_flatten(grads), 2),
        "scale_": Contest(lambda: ops.scale_(grads, signs), baselines.plain_scale(grads, signs), 2),
        "PCGrad": Contest(lambda: _surgery(grads, pcgrad, out), baselines.plain_pcgrad(grads), 2 + 1 / K),
    }


def _surgery(grads: TaskGradients, pcgrad: PCGrad, out: list[Tensor | None]) -> None:
    """From the lists of gradients to the update: marshalling, Gram matrix, solve, combine."""
    fresh = TaskGradients.from_rows(grads.rows)
    weights, _ = pcgrad.weigh(fresh)
    ops.combine(fresh, weights, out=out)


def _rows(elements: int, rounds: int, quick: bool, progress: bool) -> Iterator[dict[str, Any]]:
    """One dict an op, K and dtype."""
    tasks = (2, 8) if quick else (2, 4, 8, 16)
    cases = [(K, torch.float32) for K in tasks] + [(8, torch.bfloat16)]
    for K, dtype in track(cases, "timing", disable=not progress, transient=True):
        grads = scattered(K, elements, dtype)
        nbytes = K * elements * dtype.itemsize
        contests = _contests(grads)
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
    native = _native.C
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": native.isa() if native else "reference",
        "rounds": rounds,
        "build": _native.build_facts(),
    }
    if as_json:
        print(json.dumps({"facts": facts, "rows": rows}, indent=1))
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


def _spread(quartiles: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in quartiles)
    return f"{middle} [dim]({low}-{high})[/dim]"
