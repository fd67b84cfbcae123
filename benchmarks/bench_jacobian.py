"""Times and weighs the ways to compute the Jacobian of losses from one forward pass, beside other libraries.

    python benchmarks/bench_jacobian.py --json build/jacobian.json                      # measures; prints tables
    python benchmarks/bench_jacobian.py --load build/jacobian.json --plot docs/images/jacobian.svg  # shows them again

A step is the forward pass, the backward passes and the surgery with PCGrad. Each round runs every contestant once. Run
it while nothing else runs. FLOPs are counted, and the peak memory measured in a process of its own, from the losses on.
What was measured is saved after each trunk and K. `--quick` tries the program on tiny trunks with two tasks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cell_program
from contestant import flops, second_peak
from jacobian_report import Cell, auto_over_stored, limits, multiples
from jacobian_trunks import QUICK, TRUNKS
from jacobian_ways import AUTOGRAM, ways, why_without_autogram
from readme_table import TASKS
from step_report import Measured
from step_rounds import fresh_process, measure, without_gradients
from step_ways import BARE, Passes

from mtlfast import StepResult


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


def plan(result: Any) -> str:
    """How mtlfast computed the Jacobian, in a few words."""
    if not isinstance(result, StepResult):
        return ""
    implicit = sum(layer.way == "implicit" for layer in result.plan.layers)
    if not implicit:
        return result.plan.way
    return f"{result.plan.sweep}, {implicit} of {len(result.plan.layers)} implicit"


def peak(name: str, trunk: str, num_tasks: int) -> int:
    """That of a contestant, as `second_peak` measures it."""
    return second_peak(ways(num_tasks, (TRUNKS | QUICK)[trunk], Passes())[name])


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draws the picture."""
    import jacobian_picture  # matplotlib is needed only here

    jacobian_picture.draw(cells, path)


def main() -> None:
    """Runs the program."""
    cell_program.run(
        cell_program.Benchmark(
            description="Times and weighs the ways to compute a Jacobian.",
            trunks=list(TRUNKS),
            quick=list(QUICK),
            tasks=TASKS,
            quick_tasks=TASKS[:1],
            tasks_help="the numbers of tasks",
            measured=measured,
            sections=lambda cells: (multiples(cells), auto_over_stored(cells), limits(cells)),
            draw=draw,
        )
    )


if __name__ == "__main__":
    main()
