"""Every method on every seed."""

from __future__ import annotations

import torch
from data import split_digits
from methods import make_aggregator, make_weighting
from tasks import TASKS
from tqdm import tqdm
from train import Run, train

from mtlfast.aggregation import Sum

SINGLE, SUM = "single-task", "Sum"


def experiment(
    aggregator: str, weighting: str | None, seeds: int, epochs: int, device: str, progress: bool
) -> dict[str, list[Run]]:
    """Trains single-task networks, and the shared one with Sum and with a method to compare.

    Args:
        aggregator: the method's, by name.
        weighting: of the losses, by name; None: they are not weighted.
        seeds: how many; each has its own split, initial weights and batches, the same for all methods.
        epochs: of each training.
        device: where to train.
        progress: show a progress bar.

    Returns:
        method -> one Run of all tasks for each seed; the method to compare comes last.
    """
    compared = aggregator if weighting is None else f"{weighting} + {aggregator}"
    runs: dict[str, list[Run]] = {method: [] for method in (SINGLE, SUM, compared)}
    with tqdm(total=seeds * epochs * (len(TASKS) + 2), unit=" epochs", disable=not progress) as bar:
        for seed in range(seeds):
            digits = split_digits(seed, torch.device(device))
            bar.set_description(f"seed {seed}, {SINGLE}")
            alone = [train([task], Sum(), digits, seed, epochs, bar.update) for task in TASKS]
            runs[SINGLE].append(_side_by_side(alone))

            made = None if weighting is None else make_weighting(weighting, len(TASKS)).to(device)
            for method, by, weighed in (
                (SUM, Sum(), None),
                (compared, make_aggregator(aggregator, len(TASKS)).to(device), made),
            ):
                bar.set_description(f"seed {seed}, {method}")
                runs[method].append(train(TASKS, by, digits, seed, epochs, bar.update, weighed))
    return runs


def _side_by_side(runs: list[Run]) -> Run:
    """K runs of one task each as if they were one of K tasks; it has no cosines."""
    return Run(
        canvases=runs[0].canvases,
        losses=[torch.cat(losses) for losses in zip(*(run.losses for run in runs), strict=True)],
        outputs=[output for run in runs for output in run.outputs],
        metrics=[metric for run in runs for metric in run.metrics],
    )
