"""Every method on every seed."""

from __future__ import annotations

import torch
from data import split_digits
from tasks import TASKS
from tqdm import tqdm
from train import Run, train

from mtlfast.aggregation import PCGrad, Sum

SINGLE, SUM, PCGRAD = METHODS = ("single-task", "Sum", "PCGrad")


def experiment(seeds: int, epochs: int, device: str, progress: bool) -> dict[str, list[Run]]:
    """Trains single-task networks, and the shared one with Sum and with PCGrad.

    Args:
        seeds: how many; each has its own split, initial weights and batches, the same for all methods.
        epochs: of each training.
        device: where to train.
        progress: show a progress bar.

    Returns:
        method -> one Run of all tasks for each seed.
    """
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    with tqdm(total=seeds * epochs * (len(TASKS) + 2), unit=" epochs", disable=not progress) as bar:
        for seed in range(seeds):
            digits = split_digits(seed, torch.device(device))
            orders = torch.Generator(device).manual_seed(seed)  # PCGrad's draws alone

            bar.set_description(f"seed {seed}, {SINGLE}")
            alone = [train([task], Sum(), digits, seed, epochs, bar.update) for task in TASKS]
            runs[SINGLE].append(_side_by_side(alone))

            for method, aggregator in ((SUM, Sum()), (PCGRAD, PCGrad(generator=orders))):
                bar.set_description(f"seed {seed}, {method}")
                runs[method].append(train(TASKS, aggregator, digits, seed, epochs, bar.update))
    return runs


def _side_by_side(runs: list[Run]) -> Run:
    """K runs of one task each as if they were one of K tasks; it has no cosines."""
    return Run(
        canvases=runs[0].canvases,
        losses=[torch.cat(losses) for losses in zip(*(run.losses for run in runs), strict=True)],
        outputs=[output for run in runs for output in run.outputs],
        metrics=[metric for run in runs for metric in run.metrics],
    )
