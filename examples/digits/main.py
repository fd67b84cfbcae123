"""Two overlaid digits, four tasks: each task alone, the sum of the task gradients, and a method, PCGrad at first."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import torch
import typer
from experiment import SUM, experiment
from figure import save
from rich.console import Console
from rich.table import Table
from tasks import TASKS

PICTURE = Path(__file__).parent / "digits.png"


def run(
    seeds: int = 3,
    epochs: int = 30,
    out: Path | None = None,
    progress: bool = False,
    device: str = "cpu",
    aggregator: str = "PCGrad",
    weighting: str | None = None,
    groups: str | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Trains every method on every seed.

    Args:
        seeds: how many.
        epochs: of each training.
        out: where the picture goes; None: no picture.
        progress: show a progress bar.
        device: where to train.
        aggregator: of the method to compare, by name.
        weighting: of its losses, by name, or None.
        groups: of the trunk's parameters, "tensor" or "module", in which the method is run once more; None: it is not.

    Returns:
        method -> task -> its test metric for each seed.
    """
    threads = torch.get_num_threads()
    # A second thread gains this small a network little, and costs it a lot where other work uses the cores.
    torch.set_num_threads(1)
    try:
        runs = experiment(aggregator, weighting, groups, seeds, epochs, device, progress)
    finally:
        torch.set_num_threads(threads)
    if out is not None:
        save(runs, out)
    return {
        method: {task.name: [trained.metrics[k] for trained in of_seeds] for k, task in enumerate(TASKS)}
        for method, of_seeds in runs.items()
    }


def comparison(metrics: dict[str, dict[str, list[float]]]) -> Table:
    """The methods side by side.

    Args:
        metrics: method -> task -> one number for each seed, as from `run`.

    Returns:
        A table to print, mean and standard deviation over the seeds.
    """
    seeds = len(metrics[SUM][TASKS[0].name])
    table = Table(title=f"Test metrics, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}")
    table.caption = " · ".join(f"{task.name}: {task.metric_name}" for task in TASKS)
    table.add_column("task", no_wrap=True)
    compared = list(metrics)[-1]
    for method in (*metrics, f"{compared} - {SUM}"):
        table.add_column(method, justify="right", no_wrap=len(metrics) < 4)  # more take two lines on a narrow terminal
    for task in TASKS:
        values = [of_tasks[task.name] for of_tasks in metrics.values()]
        pairs = zip(metrics[compared][task.name], metrics[SUM][task.name], strict=True)
        # Seed by seed: both started from the same weights and saw the same batches.
        difference = [one - plain for one, plain in pairs]
        arrow = "↑" if task.higher_is_better else "↓"
        cells = [*map(_spread, values), _spread(difference, sign="+")]
        table.add_row(f"{task.name} {arrow}", *cells)
    return table


def _spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.2f}{spread}"


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to average over.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 30,
    out: Annotated[Path, typer.Option(help="Where to save the picture.")] = PICTURE,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    aggregator: Annotated[str, typer.Option(help="The method to compare, of `python -m mtlfast methods`.")] = "PCGrad",
    weighting: Annotated[str | None, typer.Option(help="Its loss weighting, of the same list.")] = None,
    groups: Annotated[str | None, typer.Option(help="Run it once more by groups: tensor or module.")] = None,
) -> None:
    """Two overlaid digits, four tasks: each task alone, the sum of the task gradients, and a method to compare."""
    console = Console()
    console.print(comparison(run(seeds, epochs, out, True, device, aggregator, weighting, groups)))
    console.print(f"Picture: {out}")


if __name__ == "__main__":
    typer.run(main)
