"""Every method on every seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from data import split_digits
from tasks import TASKS
from tqdm import tqdm
from train import Run, train

import mtlfast
from mtlfast.aggregation import Sum

SINGLE, SUM = "single-task", "Sum"
M = TypeVar("M")


def experiment(
    aggregator: str, weighting: str | None, groups: str | None, seeds: int, epochs: int, device: str, progress: bool
) -> dict[str, list[Run]]:
    """Trains single-task networks, and the shared one with Sum and with a method to compare, also in groups.

    Args:
        aggregator: the method's, by name.
        weighting: of the losses, by name; None: they are not weighted.
        groups: of the trunk's parameters, in which the method is run once more; None: it is not.
        seeds: how many; each has its own split, initial weights and batches, the same for all methods.
        epochs: of each training.
        device: where to train.
        progress: show a progress bar.

    Returns:
        method -> one Run of all tasks for each seed; the method to compare comes last.

    Raises:
        ValueError: there is no method of that name for these tasks.
    """
    make_aggregator = _named(aggregator, mtlfast.methods(len(TASKS)))
    make_weighting = None if weighting is None else _named(weighting, mtlfast.weightings(len(TASKS)))
    compared = aggregator if weighting is None else f"{weighting} + {aggregator}"
    in_groups = {} if groups is None else {f"by {groups}": groups}
    runs: dict[str, list[Run]] = {method: [] for method in (SINGLE, SUM, compared, *in_groups)}
    with tqdm(total=seeds * epochs * (len(TASKS) + len(runs) - 1), unit=" epochs", disable=not progress) as bar:
        for seed in range(seeds):
            digits = split_digits(seed, torch.device(device))
            bar.set_description(f"seed {seed}, {SINGLE}")
            alone = [train([task], Sum(), digits, seed, epochs, bar.update) for task in TASKS]
            runs[SINGLE].append(_side_by_side(alone))

            bar.set_description(f"seed {seed}, {SUM}")
            runs[SUM].append(train(TASKS, Sum(), digits, seed, epochs, bar.update))
            for method, of_trunk in {compared: None, **in_groups}.items():
                bar.set_description(f"seed {seed}, {method}")
                by = make_aggregator().to(device)
                weighed = None if make_weighting is None else make_weighting().to(device)
                runs[method].append(train(TASKS, by, digits, seed, epochs, bar.update, weighed, of_trunk))
    return runs


def _named(name: str, known: dict[str, Callable[[], M]]) -> Callable[[], M]:
    if name not in known:
        raise ValueError(f"{name!r} is none of {', '.join(known)}")
    return known[name]


def _side_by_side(runs: list[Run]) -> Run:
    """K runs of one task each as if they were one of K tasks; it has no cosines."""
    return Run(
        canvases=runs[0].canvases,
        losses=[torch.cat(losses) for losses in zip(*(run.losses for run in runs), strict=True)],
        outputs=[output for run in runs for output in run.outputs],
        metrics=[metric for run in runs for metric in run.metrics],
    )
