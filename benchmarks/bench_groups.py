"""Times surgery with one group for each parameter tensor beside surgery on all at once, and the loop that others run.

    python benchmarks/bench_groups.py            # prints tables; --quick tries it on small gradients

The gradients have 25M elements a task in 300 tensors. Rivals take turns in one process; a ratio is the median of the
rounds, with quartiles in brackets. Run it while nothing else runs, or with `--processor`, which counts processor
time on one thread.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import mtlfast
from mtlfast.aggregation import Aggregator, NashMTL, PCGrad, UPGrad
from mtlfast.bench.baselines import plain_pcgrad_by_tensor
from mtlfast.bench.contests import direction
from mtlfast.bench.timing import Timing, take_turns
from mtlfast.bench.workload import scattered
from mtlfast.task_gradients import TaskGradients

TASKS = (4, 8)
METHODS = (PCGrad, UPGrad, NashMTL)
TENSORS = 300
Turn = Callable[[dict[str, Callable[[], object]]], dict[str, Timing]]
SIZES = (100, 1_000, 3_000, 10_000, 30_000, 100_000)  # elements of each group, to see where solves dominate


def surgery(num_tasks: int, elements: int, turn: Turn) -> None:
    """Prints what directions take from the task gradients on."""
    grads = scattered(num_tasks, elements, num_tensors=TENSORS)
    out = Aggregator.targets(grads)
    turns: dict[str, Callable[[], object]] = {"the loop by hand": plain_pcgrad_by_tensor(grads)}
    for method in METHODS:
        for groups in (None, "tensor"):
            turns[name_of(method, groups)] = direction(method(), grads, out, groups is not None)
    show(f"Surgery, K = {num_tasks}", turn(turns), "the loop by hand")


def steps(num_tasks: int, elements: int, turn: Turn) -> None:
    """Prints what whole steps take: a chain of linear layers, of which each weight and bias is a group."""
    width = int((2 * elements / TENSORS) ** 0.5)
    trunk = nn.Sequential(*(nn.Linear(width, width) for _ in range(TENSORS // 2)))
    heads = [nn.Linear(width, 1) for _ in range(num_tasks)]
    x = torch.randn(8, width)

    def step(aggregator: Aggregator, groups: str | None) -> None:
        trunk.zero_grad()
        features = trunk(x)
        losses = [head(features).square().mean() for head in heads]
        mtlfast.backward(losses, aggregator, shared=trunk, groups=groups)

    turns: dict[str, Callable[[], object]] = {}
    for method in METHODS:
        for groups in (None, "tensor"):
            turns[name_of(method, groups)] = partial(step, method(), groups)
    show(f"Whole steps, K = {num_tasks}", turn(turns))


def solves(num_tasks: int, turn: Turn) -> None:
    """Prints by the size of groups how much longer surgery by tensor takes than surgery on all at once."""
    for size in SIZES:
        grads = TaskGradients.from_rows([[torch.randn(size) for _ in range(TENSORS)] for _ in range(num_tasks)])
        out = Aggregator.targets(grads)
        turns: dict[str, Callable[[], object]] = {}
        for method in METHODS:
            for groups in (None, "tensor"):
                turns[name_of(method, groups)] = direction(method(), grads, out, groups is not None)
        show(f"{TENSORS} groups of {size:,} elements, K = {num_tasks}", turn(turns))


def name_of(method: type, groups: str | None) -> str:
    """A contestant's name."""
    return f"{method.__name__}, {'by tensor' if groups else 'global'}"


def show(title: str, times: dict[str, Timing], rival: str | None = None) -> None:
    """Prints milliseconds, and the ratios of surgery by tensor to global surgery, and of the rival to it."""
    print(f"\n{title}")
    for name, timing in times.items():
        low, high = timing.quartiles
        line = f"  {name:20} {timing.median * 1e3:9.2f} ms ({low * 1e3:.2f}-{high * 1e3:.2f})"
        if name.endswith("by tensor"):
            line += "  {1:.2f} x global ({0:.2f}-{2:.2f})".format(
                *timing.ratio_to(times[name.replace("by tensor", "global")])
            )
        if name == rival:
            line += "  {1:.1f} x PCGrad, by tensor ({0:.1f}-{2:.1f})".format(
                *timing.ratio_to(times[name_of(PCGrad, "tensor")])
            )
        print(line, flush=True)


def main() -> None:
    """Runs all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small gradients, two rounds")
    parser.add_argument("--processor", action="store_true", help="processor time, on one thread")
    options = parser.parse_args()
    elements, rounds = (300_000, 2) if options.quick else (25_000_000, options.rounds)
    if options.processor:
        torch.set_num_threads(1)
    clock = time.process_time if options.processor else time.perf_counter

    def turn(turns: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        return take_turns(turns, rounds, 2, rotate=True, clock=clock)

    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for num_tasks in TASKS:
        surgery(num_tasks, elements, turn)
        steps(num_tasks, elements, turn)
        solves(num_tasks, turn)


if __name__ == "__main__":
    main()
