"""The one table of loss weightings: how each is made. Tests run over its rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlfast import weighting
from mtlfast.weighting import LossWeighting

PREFERENCES = torch.tensor([0.2, 0.5, 0.3])
BOUNDS = torch.tensor([0.05, 0.02, 0.1])

# All for three tasks.
WEIGHTINGS: dict[str, Callable[[], LossWeighting]] = {
    "Sum": weighting.Sum,
    "Mean": weighting.Mean,
    "Constant": lambda: weighting.Constant(torch.tensor([0.5, 2.0, 1.0])),
    "InverseSampleSize": lambda: weighting.InverseSampleSize(torch.tensor([10, 1000, 100]), beta=0.5),
    "ClassBalanced": lambda: weighting.ClassBalanced(torch.tensor([10, 1000, 100]), beta=0.99),
    "LossRescaling, first": lambda: weighting.LossRescaling(3),
    "LossRescaling, mean": lambda: weighting.LossRescaling(3, by="mean", decay=0.8),
    "LossRescaling, log": lambda: weighting.LossRescaling(3, by="log"),
    "Random": weighting.Random,
    "InversePerformance": lambda: weighting.InversePerformance(3, decay=0.5),
    "DynamicTaskPrioritization": lambda: weighting.DynamicTaskPrioritization(3, gamma=2.0),
    "DWA": lambda: weighting.DWA(3),
    "DWA, window": lambda: weighting.DWA(3, temperature=0.5, window=2),
    "SoftAdapt": lambda: weighting.SoftAdapt(3, beta=1.0),
    "SoftAdapt, normalized": lambda: weighting.SoftAdapt(3, variant="normalized"),
    "SoftAdapt, loss_weighted": lambda: weighting.SoftAdapt(3, variant="loss_weighted"),
    "ReLoBRaLo": lambda: weighting.ReLoBRaLo(3, alpha=0.5, beta=0.5),
    "FAMO": lambda: weighting.FAMO(3),
    "FAMO, bounds": lambda: weighting.FAMO(3, min_losses=BOUNDS, lr=0.1),
    "GO4Align": lambda: weighting.GO4Align(3, num_groups=2, eta=0.1),
    "GradNorm": lambda: weighting.GradNorm(3),
    "GradNorm, log": lambda: weighting.GradNorm(3, alpha=0.5, lr=0.1, form="log"),
    "GradNorm, sgd": lambda: weighting.GradNorm(3, lr=0.1, optimizer="sgd", initial_losses=PREFERENCES),
    "GradNorm, softmax": lambda: weighting.GradNorm(3, lr=0.1, optimizer="sgd", form="softmax"),
    "InverseNormLoss": lambda: weighting.InverseNormLoss(3, decay=0.5),
    "LRAnnealing": lambda: weighting.LRAnnealing(3, reference=2, decay=0.5),
    "AdaptiveWeight": lambda: weighting.AdaptiveWeight(3, reference=2, task=1, factor=0.5),
    "UW": lambda: weighting.UW(3),
    "UW, classification": lambda: weighting.UW(3, [True, False, True]),
    "UWSO": lambda: weighting.UWSO(temperature=0.5),
    "IMTLL": lambda: weighting.IMTLL(3),
    "GeometricMean": weighting.GeometricMean,
    "Tchebycheff": lambda: weighting.Tchebycheff(PREFERENCES, BOUNDS),
    "STCH": lambda: weighting.STCH(0.5),
    "STCH, preferring": lambda: weighting.STCH(0.1, PREFERENCES, BOUNDS),
    "PBI": lambda: weighting.PBI(5.0, PREFERENCES, BOUNDS),
    "COSMOS": lambda: weighting.COSMOS(2.0, PREFERENCES),
    "CurriculumSchedule": lambda: weighting.CurriculumSchedule([0, 1, 2], ramp=2),
    "AnnealingSchedule": lambda: weighting.AnnealingSchedule([1, 2, 3], [3, 1, 2], 4, "cosine"),
    "AnnealingSchedule, updates": lambda: weighting.AnnealingSchedule([1, 2, 3], [3, 1, 2], 4, unit="update"),
    "FreezeConverged": lambda: weighting.FreezeConverged(3, patience=2, decay=0.5),
    "PriorityTask": lambda: weighting.PriorityTask(3, task=1, weight=0.7),
}


def losses_at(step: int, device: str = "cpu") -> Tensor:
    """The three losses of a step: positive, falling at different rates, with noise."""
    generator = torch.Generator().manual_seed(step)
    rates = torch.tensor([0.9, 0.99, 0.5], dtype=torch.float64)
    return (rates**step * torch.tensor([1.0, 3.0, 0.5]) + 0.2 + 0.1 * torch.rand(3, generator=generator)).to(device)


def norms_at(step: int, device: str = "cpu") -> Tensor:
    """The norms of the three task gradients of a step."""
    return losses_at(step + 100, device).double().flip(0)


def norms_for(made: LossWeighting, step: int, device: str = "cpu", tasks: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """What `step_weights` takes beside the losses: norms, where the weighting reads them."""
    return {"norms": norms_at(step, device)[list(tasks)]} if made.reads_norms else {}


def call(made: LossWeighting, losses: Tensor, step: int, tasks: Sequence[int] = (0, 1, 2)) -> Tensor:
    """A direct call, which sees the norms of the step as `step_weights` does."""
    made._norms = norms_for(made, step, losses.device, tasks).get("norms")
    try:
        return made(losses, tasks=tasks)
    finally:
        made._norms = None


def feed(weighting: LossWeighting, step: int) -> None:
    """What a training loop tells a weighting after a step, or an epoch."""
    values = losses_at(step + 1)
    if type(weighting).__name__ != "DWA":
        weighting.update(losses=values, norms=norms_at(step), metrics=1 / (1 + values))
    elif step % 2:
        weighting.update()
