"""Three rewards over the same pairs of answers, which one preference model learns, in one backward pass a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, NamedTuple

import torch
import typer
from data import REWARDS
from figure import save
from model import Config
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from train import Run, pairs_of, step_times, train

from mtlfast.aggregation import CAGrad, Sum, UPGrad
from mtlfast.bench.timing import Timing

PICTURE = Path(__file__).parent / "preferences.png"
METHODS = {"Sum": Sum, "CAGrad": lambda: CAGrad(0.5), "UPGrad": UPGrad}


class Outcome(NamedTuple):
    """What `run` found.

    Attributes:
        runs: method -> one Run for each seed.
        times: way to compute the gradients -> the seconds of steps with UPGrad.
    """

    runs: dict[str, list[Run]]
    times: dict[str, Timing]


def run(
    seeds: int = 3,
    steps: int = 400,
    rounds: int = 50,
    config: Config | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> Outcome:
    """Trains with every method on every seed, and times steps.

    Args:
        seeds: how many; each has its own rewards, pairs, initial weights and batches, the same for all methods.
        steps: of each training.
        rounds: how many steps of each way are timed.
        config: of the model; None: the one of the README.
        out: where the picture goes; None: no picture.
        progress: show a progress bar.
    """
    config = Config() if config is None else config
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is small
    try:
        outcome = _run(seeds, steps, rounds, config, progress)
    finally:
        torch.set_num_threads(threads)
    if out is not None:
        save(outcome.runs, outcome.times, out)
    return outcome


def _run(seeds: int, steps: int, rounds: int, config: Config, progress: bool) -> Outcome:
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    with tqdm(total=seeds * steps * len(METHODS), unit=" steps", disable=not progress) as bar:
        for seed in range(seeds):
            pairs = pairs_of(seed)
            for method, aggregator in METHODS.items():
                bar.set_description(f"seed {seed}, {method}")
                runs[method].append(train(aggregator(), pairs, config, seed, steps, bar.update))
    return Outcome(runs, step_times(config, rounds))


def trade_off(runs: Mapping[str, Sequence[Run]]) -> Table:
    """How well each method serves each reward."""
    seeds = len(runs["Sum"])
    table = Table(
        title="New pairs that are ordered as a reward orders them, %, "
        f"mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}"
    )
    table.add_column("method")
    for column in (*REWARDS, "worst"):
        table.add_column(column, justify="right")
    for method, of_seeds in runs.items():
        ends = torch.stack([run.accuracies[-1] for run in of_seeds])
        columns = [*ends.unbind(1), ends.min(1).values]
        table.add_row(method, *(_spread(column.tolist()) for column in columns))
    return table


def timings(times: Mapping[str, Timing]) -> Table:
    """What a step takes, by the way to compute the gradients."""
    table = Table(title="A step with UPGrad, one thread")
    for column in ("way", "ms", "times a plain step"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, timing in times.items():
        low, middle, high = timing.ratio_to(times["plain"])
        table.add_row(way, f"{timing.median * 1e3:.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})")
    table.caption = "medians and quartiles of steps in turn"
    return table


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to average over.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 400,
    width: Annotated[int, typer.Option(min=1, help="Of the model's hidden layers.")] = Config().width,
    layers: Annotated[int, typer.Option(min=1, help="How many hidden layers the model has.")] = Config().layers,
    out: Annotated[Path, typer.Option(help="Where to save the picture.")] = PICTURE,
) -> None:
    """Three rewards over the same pairs of answers: the trade-off by method, and what a step takes."""
    console = Console()
    outcome = run(seeds, steps, config=Config(width=width, layers=layers), out=out, progress=True)
    console.print(trade_off(outcome.runs))
    console.print(timings(outcome.times))
    console.print(f"Picture: {out}")


if __name__ == "__main__":
    typer.run(main)
