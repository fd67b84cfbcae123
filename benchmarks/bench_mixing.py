"""Times and weighs steps of K tasks that are mixtures of the losses of samples, beside K passes and TorchJD.

    python benchmarks/bench_mixing.py --json build/mixing.json                      # measures; prints tables
    python benchmarks/bench_mixing.py --load build/mixing.json --plot docs/images/mixing.svg  # shows them again

A step is the forward pass, the backward passes and the surgery with UPGrad. Each round runs every contestant once. Run
it while nothing else runs. `--tasks 0` stands for A = I, each sample a task, with UPGrad and MGDA beside TorchJD's
autogram; with 256 samples UPGrad alone takes most of the time, and so there are few rounds. What was measured is saved
after each trunk and K. `--quick` tries the program on a tiny trunk.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cell_program
import torch
from contestant import Contestant, flops, second_peak
from jacobian_report import Cell
from jacobian_ways import why_refused
from mixing_report import limits, multiples
from mixing_ways import AUTO, DISJOINT, EACH_SAMPLE, METHODS, OURS, QUICK, THEIRS, TRUNKS, ways
from step_rounds import WARMUPS, fresh_process, measure, without_gradients
from step_ways import PLAIN, Passes
from torch.utils.flop_counter import FlopCounterMode

from mtlfast import StepResult, ops

TASKS, MANY = (2, 5, 8, 32), 128  # K; and from how many tasks on there are few rounds
FEW_ROUNDS, FIRSTS = 2, 5
TOLERANCE = 1e-3  # of autogram's G, which in float32 is 1.2e-4 away for the transformer, and in float64 1e-14


def measured(trunk: str, num_tasks: int, rounds: int, memory: bool) -> Cell:
    """What one trunk and K take.

    Args:
        trunk: the trunk's name.
        num_tasks: K, or `EACH_SAMPLE`.
        rounds: alternating rounds.
        memory: whether memory is measured.
    """
    size, passes = (TRUNKS | QUICK)[trunk], Passes()
    K = num_tasks or size.shape[0]
    contestants = ways(num_tasks, size, passes)
    refused = _refused(contestants) if num_tasks == EACH_SAMPLE else {}
    contestants = {name: x for name, x in contestants.items() if name not in refused}
    model = contestants[PLAIN].model
    parameters = [parameter for x in contestants.values() for parameter in x.model.parameters]
    turns = {name: x.step for name, x in contestants.items()}
    slow = K >= MANY
    found = measure(turns, parameters, passes, min(rounds, FEW_ROUNDS) if slow else rounds, 1 if slow else WARMUPS)
    for name, contestant in contestants.items():
        found[name] |= {"flops": all_flops(contestant), "plan": plan(contestant.step()), "first": []}
        without_gradients(lambda: None, parameters)
    for name in () if slow else (AUTO, DISJOINT, *(OURS + method for method in METHODS)):
        if name in contestants:
            found[name]["first"] = [first_step(name, trunk, num_tasks) for _ in range(min(rounds, FIRSTS))]
    if memory:
        with fresh_process() as run:
            for name in contestants:
                found[name]["peak"] = run(peak, name, trunk, num_tasks)
    P = sum(parameter.numel() for parameter in model.trunk.parameters())
    each = num_tasks == EACH_SAMPLE
    return {"trunk": trunk, "K": K, "each sample": each, "P": P, "ways": found, "refused": refused}


def _refused(contestants: dict[str, Contestant]) -> dict[str, str]:
    """TorchJD's engines that fail or have another G, with the reasons."""
    gram = contestants[OURS + "MGDA"].step().gram
    reasons = {THEIRS + method: why_refused(contestants[THEIRS + method], gram, TOLERANCE) for method in METHODS}
    return {name: why for name, why in reasons.items() if why}


def all_flops(contestant: Contestant) -> int:
    """The floating-point operations of a step, with those of `ops.gram`, which torch's counter does not see."""
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        contestant.forward()
    products = 0
    gram = ops.gram

    def counted(gradients: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal products
        K = gradients.num_tasks
        products += K * (K + 1) * sum(gradients.column(t)[0].numel() for t in range(len(gradients.shapes)))
        return gram(gradients, *args, **kwargs)

    with mock.patch.object(ops, "gram", counted):
        backward = flops(contestant)
    return int(forward.get_total_flops()) + backward + products


def plan(result: Any) -> str:
    """How mtlfast computed the Jacobian."""
    return result.plan.way if isinstance(result, StepResult) else ""


def first_step(name: str, trunk: str, num_tasks: int) -> float:
    """The time of a new model's first step, which makes and probes the plan, over that of a plain one before it."""
    contestants = ways(num_tasks, (TRUNKS | QUICK)[trunk], Passes())
    plain = contestants[PLAIN]
    without_gradients(plain.step, plain.model.parameters)
    before = _seconds(plain.step)
    without_gradients(lambda: None, plain.model.parameters)
    return _seconds(contestants[name].step) / before


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(name: str, trunk: str, num_tasks: int) -> int:
    """That of a contestant, as `second_peak` measures it."""
    return second_peak(ways(num_tasks, (TRUNKS | QUICK)[trunk], Passes())[name])


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draws the picture."""
    import mixing_picture  # matplotlib is needed only here

    mixing_picture.draw(cells, path)


def main() -> None:
    """Runs the program."""
    cell_program.run(
        cell_program.Benchmark(
            description="Times and weighs steps of tasks that are mixtures of samples.",
            trunks=list(TRUNKS),
            quick=list(QUICK),
            tasks=(*TASKS, EACH_SAMPLE),
            quick_tasks=(TASKS[0], TASKS[1], EACH_SAMPLE),
            tasks_help="the numbers of tasks; 0: each sample is one",
            measured=measured,
            sections=lambda cells: (multiples(cells), limits(cells)),
            draw=draw,
        )
    )


if __name__ == "__main__":
    main()
