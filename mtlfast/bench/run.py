"""Runs the sections of the benchmark and shows them."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from mtlfast import _native
from mtlfast.bench import compiled, faces, memory_speed, peak_memory, peers, sizes, solves
from mtlfast.bench.section import Section


def run_bench(elements: int, rounds: int, quick: bool, as_json: bool) -> None:
    """Times every section and prints tables as they come, or one JSON object at the end.

    Args:
        elements: P, elements of one task's gradient.
        rounds: alternating rounds.
        quick: the ops and the peers alone, in fewer rows.
        as_json: print JSON.
    """
    facts = facts_of_run(rounds)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchjd")  # what its solvers say of themselves, amid the tables
        if as_json:
            sections = {s.name: s for s in _sections(elements, rounds, quick, iter)}
            rows = {n: {"title": s.title, "caption": s.caption, "rows": s.rows} for n, s in sections.items()}
            print(json.dumps({"facts": facts, **rows}, indent=1))
        else:
            from mtlfast.bench import tables  # draws with rich, which only the extra `cli` installs

            tables.show(facts, _sections(elements, rounds, quick, tables.progress))


def facts_of_run(rounds: int) -> dict[str, Any]:
    """What holds for all tables of one run."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": _native.C.isa() if _native.C else "reference",
        "rounds": rounds,
        "build": _native.build_facts(),
    }


def _sections(
    elements: int, rounds: int, quick: bool, progress: Callable[[Sequence[Any]], Iterable[Any]]
) -> Iterator[Section]:
    yield memory_speed.measure(elements, rounds, quick, progress)
    if peers.installed():
        yield peers.measure(elements, rounds, quick)
    if not quick:
        yield faces.measure(elements, rounds)
        yield solves.measure(rounds)
        yield compiled.measure(elements, rounds)
        yield from sizes.measure(rounds)
        yield peak_memory.measure(elements)
