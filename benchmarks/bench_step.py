"""Times a training step by way to get the task gradients, and beside TorchJD and Pytorch-PCGrad, in one process.

    python benchmarks/bench_step.py --json build/step.json                                # measures; prints tables
    python benchmarks/bench_step.py --load build/step.json --picture docs/images/step.svg  # shows and draws them again

A step is the forward passes, the backward passes and the surgery with PCGrad, on the transformer of the main README.
Each round runs every contestant once. Run it while nothing else runs. Peak memory is measured afterwards, each
contestant in a process of its own. `--quick` tries the program on a tiny model with two tasks.
"""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from readme_table import TASKS
from step_report import ratios, times
from step_rounds import fresh_process, measure, run_facts, without_gradients
from step_ways import FULL, QUICK, Passes, Size, ways

from mtlfast.bench import tables
from mtlfast.bench.peak_memory import extra_bytes


def peak(name: str, num_tasks: int, size: Size) -> int:
    """The bytes that the contestant's second step holds at most, beside what is there before it."""
    contestants, parameters = ways(num_tasks, size, Passes())
    step = partial(without_gradients, contestants[name], parameters)
    step()
    return extra_bytes(step)


def all_measured(size: Size, rounds: int, tasks: tuple[int, ...] = TASKS) -> dict[str, Any]:
    """Everything, as it is saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.vmap's, which TorchJD uses
        measured = {K: measure(*ways(K, size, passes := Passes()), passes, rounds) for K in tasks}
    with fresh_process() as run:
        for K, of_ways in measured.items():
            for name, way in of_ways.items():
                way["peak"] = run(peak, name, K, size)
    return {"facts": run_facts(rounds) | {"size": size._asdict()}, "tasks": measured}


def main() -> None:
    """Measures or loads, shows, saves and draws."""
    parser = argparse.ArgumentParser(description="Times a training step by way and by library.")
    parser.add_argument("--rounds", type=int, default=30, help="rounds for each K")
    parser.add_argument("--quick", action="store_true", help="2 rounds of a tiny model with two tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the measurements")
    parser.add_argument("--load", type=Path, metavar="FILE", help="show saved measurements instead of measuring")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the steps")
    arguments = parser.parse_args()
    if arguments.load:
        saved = json.loads(arguments.load.read_text())
    elif arguments.quick:
        saved = all_measured(QUICK, rounds=2, tasks=TASKS[:1])
    else:
        saved = all_measured(FULL, arguments.rounds)
    tasks = {int(K): of_ways for K, of_ways in saved["tasks"].items()}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(saved) + "\n")
    tables.show(saved["facts"], [times(tasks), ratios(tasks)], "95 % confidence intervals")
    if arguments.picture:
        from step_picture import draw  # matplotlib is needed only here

        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(tasks, arguments.picture)


if __name__ == "__main__":
    main()
