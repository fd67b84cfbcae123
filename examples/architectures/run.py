"""Seven ways to share parameters between tasks, each trained with the sum of the gradients, PCGrad and UPGrad."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from experiment import ROWS, SINGLE, Outcome, experiment
from figure import save
from rich.console import Console
from rich.table import Table

PICTURE = Path(__file__).parent / "architectures.png"
CORRELATIONS = (-1.0, 0.0, 0.5, 1.0)


def table(correlation: float | None, outcome: Outcome) -> Table:
    """All rows on one workload.

    Args:
        correlation: of the synthetic tasks; None: the canvases.
        outcome: what was found.

    Returns:
        A table to print, mean and standard deviation over the seeds.
    """
    workload = "Canvases" if correlation is None else f"Synthetic regression, correlation {correlation:g}"
    seeds = len(outcome.metrics[SINGLE])
    made = Table(title=f"{workload}: mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}")
    made.caption = " · ".join(f"{task.name}: {task.metric_name}" for task in outcome.tasks)
    made.add_column("architecture", no_wrap=True)
    made.add_column("method")
    for task in outcome.tasks:
        made.add_column(f"{task.name} {'↑' if task.higher_is_better else '↓'}", justify="right")
    made.add_column("Δm, % ↑", justify="right")
    for row, following in zip(ROWS, (*ROWS[1:], ("", "")), strict=True):
        of_tasks = [_spread(list(values)) for values in zip(*outcome.metrics[row], strict=True)]
        change = "0" if row == SINGLE else _spread(outcome.delta_m(row), "+")
        made.add_row(*row, *of_tasks, change, end_section=row[0] != following[0])
    return made


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{spread}"


def main(
    correlation: Annotated[
        list[float] | None,
        typer.Option(
            min=-1, max=1, help="Of the synthetic tasks; may be given several times.", show_default="-1, 0, 0.5, 1"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to average over.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 300,
    grouped: Annotated[bool, typer.Option("--grouped", help="A surgery for each set of tasks that share.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Trainings at the same time, of one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Where to save the picture.")] = PICTURE,
    quick: Annotated[bool, typer.Option("--quick", help="One seed and 50 steps, to see that it runs.")] = False,
) -> None:
    """Seven ways to share parameters between tasks, each trained with Sum, PCGrad and UPGrad."""
    if quick:
        seeds, steps = 1, 50
    console = Console()
    outcomes = experiment(correlation or CORRELATIONS, seeds, steps, grouped, processes, progress=True)
    for of_tasks, outcome in outcomes.items():
        console.print(table(of_tasks, outcome))
    save(outcomes, out)
    console.print(f"Picture: {out}")


if __name__ == "__main__":
    typer.run(main)
