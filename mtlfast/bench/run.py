"""Runs the sections of the benchmark and shows them."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

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
    facts, console = _facts(rounds), Console()
    done: dict[str, Any] = {"facts": facts}
    if not as_json:
        console.print(f"torch {facts['torch']}, {facts['threads']} threads, {facts['kernels']} kernels")
    for section in _sections(elements, rounds, quick, progress=not as_json):
        done[section.name] = {"title": section.title, "caption": section.caption, "rows": section.rows}
        if section.rows and not as_json:
            console.print(section.table(console.width))
    if as_json:
        print(json.dumps(done, indent=1))


def _facts(rounds: int) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": _native.C.isa() if _native.C else "reference",
        "rounds": rounds,
        "build": _native.build_facts(),
    }


def _sections(elements: int, rounds: int, quick: bool, progress: bool) -> Iterator[Section]:
    yield memory_speed.measure(elements, rounds, quick, progress)
    if peers.installed():
        yield peers.measure(elements, rounds, quick)
    if not quick:
        yield faces.measure(elements, rounds)
        yield solves.measure(rounds)
        yield compiled.measure(elements, rounds)
        yield from sizes.measure(rounds)
        yield peak_memory.measure(elements)
