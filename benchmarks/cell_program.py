"""The program around a benchmark of trunks and numbers of tasks: options, saving, tables and the picture."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jacobian_report import Cell, markdown
from step_rounds import run_facts

from mtlfast.bench.section import Section


class Benchmark(NamedTuple):
    """What differs between such programs.

    Attributes:
        description: what it does.
        trunks: the names of its trunks.
        quick: those of the tiny ones.
        tasks: K.
        quick_tasks: those of `--quick`.
        tasks_help: what `--tasks` takes.
        measured: measures a trunk, K, rounds, and whether memory is measured.
        sections: the tables.
        draw: draws the cells into a file.
    """

    description: str
    trunks: Sequence[str]
    quick: Sequence[str]
    tasks: Sequence[int]
    quick_tasks: Sequence[int]
    tasks_help: str
    measured: Callable[[str, int, int, bool], Cell]
    sections: Callable[[Sequence[Cell]], Sequence[Section]]
    draw: Callable[[Sequence[Cell], Path], None]


def run(benchmark: Benchmark) -> None:
    """Measures or loads, shows, saves and draws."""
    arguments = _parser(benchmark).parse_args()
    if arguments.load:
        saved = json.loads(arguments.load.read_text())
    else:
        chosen = (arguments.trunks, arguments.tasks, arguments.rounds)
        if arguments.quick:
            chosen = (benchmark.quick, benchmark.quick_tasks, 2)
        for saved in _all_measured(benchmark, *chosen, arguments.memory):
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(saved) + "\n")
    facts, cells = saved["facts"], saved["cells"]
    print(
        f"{facts['processor']}, {facts['threads']} threads, {facts['kernels']} kernels, torch {facts['torch']}, "
        f"commit {facts['commit']}, medians of {facts['rounds']} rounds.\n"
    )
    for section in benchmark.sections(cells):
        print(markdown(section))
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        benchmark.draw(cells, arguments.plot)


def _all_measured(
    benchmark: Benchmark, trunks: Sequence[str], tasks: Sequence[int], rounds: int, memory: bool
) -> Iterator[dict[str, Any]]:
    """Everything so far, as it is saved, after each trunk and K."""
    saved: dict[str, Any] = {"facts": run_facts(rounds), "cells": []}
    for trunk in trunks:
        for K in tasks:
            print(f"{trunk}, K = {K}", file=sys.stderr, flush=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.vmap's, which TorchJD uses
                saved["cells"].append(benchmark.measured(trunk, K, rounds, memory))
            yield saved


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=benchmark.description)
    known = [*benchmark.trunks, *benchmark.quick]
    parser.add_argument("--rounds", type=int, default=30, help="rounds for each trunk and K")
    parser.add_argument("--trunks", nargs="+", default=list(benchmark.trunks), choices=known, metavar="TRUNK")
    tasks = list(benchmark.tasks)
    parser.add_argument("--tasks", nargs="+", type=int, default=tasks, metavar="K", help=benchmark.tasks_help)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory")
    parser.add_argument("--quick", action="store_true", help="2 rounds of tiny trunks with few tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the measurements")
    parser.add_argument("--load", type=Path, metavar="FILE", help="show saved measurements instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw what was measured")
    return parser
