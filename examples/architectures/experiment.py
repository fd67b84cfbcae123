"""Every architecture with every method on every workload and seed, in processes of one thread each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import mean
from typing import NamedTuple

import torch
from architectures import ARCHITECTURES
from canvases import canvases
from hard_sharing import HardSharing
from synthetic import synthetic
from tqdm import tqdm
from train import train
from workload import Task, Workload

from mtlfast.aggregation import PCGrad, Sum, UPGrad

METHODS = {"Sum": Sum, "PCGrad": PCGrad, "UPGrad": UPGrad}
SINGLE = ("single-task", "")
ROWS = (SINGLE, *((architecture, method) for architecture in ARCHITECTURES for method in METHODS))


class Outcome(NamedTuple):
    """What was found on one workload.

    Attributes:
        tasks: K of them.
        metrics: (architecture, method), or SINGLE -> for each seed the K test metrics.
    """

    tasks: tuple[Task, ...]
    metrics: dict[tuple[str, str], list[list[float]]]

    def delta_m(self, row: tuple[str, str]) -> list[float]:
        """How much better than the single-task networks a row is, in %, mean over the tasks, for each seed.

        Each task counts by the relative change of its metric (Maninis et al., CVPR 2019). Above 0 is better.
        """
        signs = [1 if task.higher_is_better else -1 for task in self.tasks]
        return [
            100 * mean(sign * (one - base) / base for sign, one, base in zip(signs, of_row, of_single, strict=True))
            for of_row, of_single in zip(self.metrics[row], self.metrics[SINGLE], strict=True)
        ]


class Training(NamedTuple):
    """One row's training on one workload and seed.

    Attributes:
        correlation: of the synthetic tasks; None: the canvases.
        row: (architecture, method), or SINGLE, which trains a network for each task.
        seed: of everything.
        steps: how many.
        grouped: a surgery for each set of tasks that share something.
    """

    correlation: float | None
    row: tuple[str, str]
    seed: int
    steps: int
    grouped: bool

    def workload(self) -> Workload:
        """What is trained on."""
        return canvases(self.seed) if self.correlation is None else synthetic(self.correlation, self.seed)

    def run(self) -> list[float]:
        """Trains, and returns the K test metrics."""
        workload = self.workload()
        tasks = range(len(workload.tasks))
        if self.row == SINGLE:
            return [train(HardSharing, workload, [k], Sum(), self.seed, self.steps)[0] for k in tasks]
        architecture, method = self.row
        made = METHODS[method]()
        return train(ARCHITECTURES[architecture], workload, tasks, made, self.seed, self.steps, self.grouped)


def experiment(
    correlations: Sequence[float], seeds: int, steps: int, grouped: bool, processes: int, progress: bool
) -> dict[float | None, Outcome]:
    """Trains all rows. The results do not depend on the number of processes.

    Args:
        correlations: of the synthetic tasks; each is a workload.
        seeds: how many; each has its own data, initial weights and batches, the same for all rows.
        steps: of each training.
        grouped: a surgery for each set of tasks that share something.
        processes: that train at the same time.
        progress: show a progress bar.

    Returns:
        correlation, or None for the canvases -> its outcome.
    """
    trainings = [
        Training(correlation, row, seed, steps, grouped)
        for correlation in (*correlations, None)
        for seed in range(seeds)
        for row in ROWS
    ]
    outcomes: dict[float | None, Outcome] = {}
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        done = tqdm(pool.map(Training.run, trainings), total=len(trainings), unit=" trainings", disable=not progress)
        for training, metrics in zip(trainings, done, strict=True):
            if training.correlation not in outcomes:
                outcomes[training.correlation] = Outcome(training.workload().tasks, {row: [] for row in ROWS})
            outcomes[training.correlation].metrics[training.row].append(metrics)
    return outcomes
