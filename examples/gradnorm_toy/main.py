"""Ten regressions of different scale on one trunk: with equal weights, and with those that GradNorm learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from figure import save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import Sum
from mtlfast.weighting import GradNorm

PICTURE = Path(__file__).parent / "gradnorm_toy.png"
INPUTS, OUTPUTS, HIDDEN, BATCH = 50, 20, 100, 100
SIGMAS = torch.logspace(0, 2, 10)  # the tasks' scales, 1 to 100


class Run(NamedTuple):
    """One training.

    Attributes:
        rates: [steps, K] each task's loss over its loss in the first step.
        weights: [steps, K] the loss weights.
    """

    rates: Tensor
    weights: Tensor


class Problem(nn.Module):
    """f_k(x) = sigma_k tanh((B + E_k) x), and the network that learns it: four hidden layers, then a head a task.

    The elements of B are from N(0, 10) and those of E_k from N(0, 3.5), as in the paper. Both are divided by one
    number, which brings the arguments of tanh to a variance of 1.
    """

    def __init__(self) -> None:
        super().__init__()
        size = (13.5 * INPUTS) ** 0.5
        common = 10**0.5 * torch.randn(OUTPUTS, INPUTS)
        own = 3.5**0.5 * torch.randn(len(SIGMAS), OUTPUTS, INPUTS)
        self.matrices = (common + own) / size
        layers = [nn.Linear(INPUTS, HIDDEN), *(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))]
        self.trunk = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, OUTPUTS) for _ in SIGMAS)
        self.last = layers[-1].weight  # the last layer that the tasks share

    def losses(self) -> list[Tensor]:
        """The mean squared errors of a new batch."""
        x = torch.randn(BATCH, INPUTS)
        features = self.trunk(x)
        targets = SIGMAS[:, None, None] * (x @ self.matrices.mT).tanh()
        return [(head(features) - target).square().mean() for head, target in zip(self.heads, targets, strict=True)]


def train(balanced: bool, steps: int, alpha: float, seed: int) -> Run:
    """Trains with GradNorm's weights if `balanced`, otherwise with equal ones."""
    torch.manual_seed(seed)
    problem = Problem()
    weighting = GradNorm(len(SIGMAS), alpha, layers=problem.last) if balanced else None
    optimizer = torch.optim.Adam(problem.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses, weights = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        result = mtlfast.backward(problem.losses(), Sum(), shared=problem.trunk, weighting=weighting)
        optimizer.step()
        schedule.step()
        losses.append(result.losses.detach())
        weights.append(torch.ones(len(SIGMAS)) if result.loss_weights is None else result.loss_weights)
    rates = torch.stack(losses) / losses[0]
    return Run(rates, torch.stack(weights))


def run(steps: int = 2000, alpha: float = 0.12, seed: int = 0, out: Path | None = None) -> dict[str, Run]:
    """Trains both ways, from the same weights and on the same batches.

    Args:
        steps: how many.
        alpha: of GradNorm; the paper's for this problem.
        seed: of the problem, the networks and the batches.
        out: where the picture goes; None: no picture.

    Returns:
        A Run by the name of the weights.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is small
    try:
        runs = {"equal weights": train(False, steps, alpha, seed), "GradNorm": train(True, steps, alpha, seed)}
    finally:
        torch.set_num_threads(threads)
    if out is not None:
        save(runs, SIGMAS, out)
    return runs


def final(run: Run) -> Tensor:
    """[K] the mean of each task's relative loss over the last tenth of the steps."""
    return run.rates[-max(1, len(run.rates) // 10) :].mean(dim=0)


def comparison(runs: dict[str, Run]) -> Table:
    """The relative losses at the end."""
    table = Table(title="Loss at the end over loss at the start, ten tasks")
    for name in ("weights", "mean", "smallest", "largest", "largest / smallest"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for name, of_run in runs.items():
        rates = final(of_run)
        least, most = rates.min(), rates.max()
        table.add_row(name, *(f"{number:.2f}" for number in (rates.mean(), least, most, most / least)))
    return table


def main(
    steps: Annotated[int, typer.Option(min=2, help="Steps of each training.")] = 2000,
    alpha: Annotated[float, typer.Option(min=0, help="How strongly GradNorm prefers slow tasks.")] = 0.12,
    seed: Annotated[int, typer.Option(help="Of the problem, the networks and the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Where to save the picture.")] = PICTURE,
) -> None:
    """Ten regressions of different scale on one trunk: with equal weights, and with those that GradNorm learns."""
    console = Console()
    console.print(comparison(run(steps, alpha, seed, out)))
    console.print(f"Picture: {out}")


if __name__ == "__main__":
    typer.run(main)
