"""Times and weighs the ways to compute the Jacobian of losses from one forward pass, beside other libraries.

    python benchmarks/bench_jacobian.py --json build/jacobian.json                      # measures; prints tables
    python benchmarks/bench_jacobian.py --load build/jacobian.json --plot docs/images/jacobian.svg  # shows them again

A step is the forward pass, the backward passes and the surgery with PCGrad. Each round runs every contestant once. Run
it while nothing else runs. FLOPs are counted, and the peak memory measured in a process of its own, from the losses on.
What was measured is saved after each trunk and K. `--quick` tries the program on tiny trunks with two tasks.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jacobian_report import Cell, auto_over_stored, limits, markdown, multiples
from jacobian_trunks import QUICK, TRUNKS
from jacobian_ways import AUTOGRAM, Contestant, ways, why_without_autogram
from readme_table import TASKS
from step_report import Measured
from step_rounds import fresh_process, measure, run_facts, without_gradients
from step_ways import BARE, Passes
from torch.utils.flop_counter import FlopCounterMode

from mtlfast import StepResult
from mtlfast.bench.peak_memory import extra_bytes


def measured(trunk: str, num_tasks: int, rounds: int, memory: bool) -> Cell:
    """What one trunk and K take.

    Args:
        trunk: the trunk's name.
        num_tasks: K.
        rounds: alternating rounds.
        memory: whether memory is measured.
    """
    passes = Passes()
    contestants = ways(num_tasks, (TRUNKS | QUICK)[trunk], passes)
    model = contestants[BARE].model
    parameters = [parameter for of in (model, contestants[AUTOGRAM].model) for parameter in of.parameters]
    why = why_without_autogram(contestants)
    if why:
        del contestants[AUTOGRAM]
    found: Measured = measure({name: x.step for name, x in contestants.items()}, parameters, passes, rounds)
    for name, contestant in contestants.items():
        found[name] |= {"flops": flops(contestant), "plan": plan(contestant.step())}
        without_gradients(lambda: None, parameters)
    if memory:
        with fresh_process() as run:
            for name in contestants:
                found[name]["peak"] = run(peak, name, trunk, num_tasks)
    size = sum(parameter.numel() for parameter in model.trunk.parameters())
    return {"trunk": trunk, "K": num_tasks, "P": size, "ways": found, "refused": {AUTOGRAM: why} if why else {}}


def flops(contestant: Contestant) -> int:
    """The floating-point operations from the losses on. In a forward pass the counter would add hooks to the graph."""
    features, losses = contestant.model.losses()
    with FlopCounterMode(display=False) as counter:
        contestant.backward(features, losses)
    return int(counter.get_total_flops())


def plan(result: Any) -> str:
    """How mtlfast computed the Jacobian, in a few words."""
    if not isinstance(result, StepResult):
        return ""
    implicit = sum(layer.way == "implicit" for layer in result.plan.layers)
    if not implicit:
        return result.plan.way
    return f"{result.plan.sweep}, {implicit} of {len(result.plan.layers)} implicit"


def peak(name: str, trunk: str, num_tasks: int) -> int:
    """The bytes that a contestant's second step holds at most from the losses on, beside what is there then."""
    contestant = ways(num_tasks, (TRUNKS | QUICK)[trunk], Passes())[name]
    without_gradients(contestant.step, contestant.model.parameters)
    features, losses = contestant.model.losses()
    return extra_bytes(lambda: contestant.backward(features, losses))


def all_measured(trunks: Sequence[str], tasks: Sequence[int], rounds: int, memory: bool) -> Iterator[dict[str, Any]]:
    """Everything so far, as it is saved, after each trunk and K."""
    saved: dict[str, Any] = {"facts": run_facts(rounds), "cells": []}
    for trunk in trunks:
        for K in tasks:
            print(f"{trunk}, K = {K}", file=sys.stderr, flush=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.vmap's, which TorchJD uses
                saved["cells"].append(measured(trunk, K, rounds, memory))
            yield saved


def main() -> None:
    """Measures or loads, shows, saves and draws."""
    parser = argparse.ArgumentParser(description="Times and weighs the ways to compute a Jacobian.")
    parser.add_argument("--rounds", type=int, default=30, help="rounds for each trunk and K")
    parser.add_argument("--trunks", nargs="+", default=list(TRUNKS), choices=[*TRUNKS, *QUICK], metavar="TRUNK")
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS), metavar="K")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory")
    parser.add_argument("--quick", action="store_true", help="2 rounds of tiny trunks with two tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the measurements")
    parser.add_argument("--load", type=Path, metavar="FILE", help="show saved measurements instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw steps and memory")
    arguments = parser.parse_args()
    if arguments.load:
        saved = json.loads(arguments.load.read_text())
    else:
        chosen = (QUICK, TASKS[:1], 2) if arguments.quick else (arguments.trunks, arguments.tasks, arguments.rounds)
        for saved in all_measured(*chosen, arguments.memory):
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(saved) + "\n")
    facts, cells = saved["facts"], saved["cells"]
    print(
        f"{facts['processor']}, {facts['threads']} threads, {facts['kernels']} kernels, torch {facts['torch']}, "
        f"commit {facts['commit']}, medians of {facts['rounds']} rounds.\n"
    )
    for section in (multiples(cells), auto_over_stored(cells), limits(cells)):
        print(markdown(section))
    if arguments.plot:
        from jacobian_picture import draw  # matplotlib is needed only here

        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(cells, arguments.plot)


if __name__ == "__main__":
    main()
