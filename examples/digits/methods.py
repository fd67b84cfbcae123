"""Aggregators and loss weightings by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from mtlfast import aggregation, weighting
from mtlfast.aggregation import Aggregator
from mtlfast.weighting import LossWeighting

# What cannot be made of the number of tasks alone.
AGGREGATORS: dict[str, Callable[[int], Aggregator]] = {
    "Constant": lambda tasks: aggregation.Constant(torch.linspace(0.5, 1.5, tasks)),
    "CAGrad": lambda tasks: aggregation.CAGrad(c=0.5),
    "Krum": lambda tasks: aggregation.Krum(n_byzantine=1),
    "CRMOGM": lambda tasks: aggregation.CRMOGM(aggregation.MGDA()),
    "Compose": lambda tasks: aggregation.Compose(aggregation.NormBalance(), aggregation.PCGrad()),
}
WEIGHTINGS: dict[str, Callable[[int], LossWeighting]] = {
    "Constant": lambda tasks: weighting.Constant(torch.linspace(0.5, 1.5, tasks)),
    "InverseSampleSize": lambda tasks: weighting.InverseSampleSize(torch.linspace(100, 400, tasks)),
    "ClassBalanced": lambda tasks: weighting.ClassBalanced(torch.linspace(100, 400, tasks), beta=0.99),
    "STCH": lambda tasks: weighting.STCH(mu=0.1),
    "PBI": lambda tasks: weighting.PBI(theta=1.0, weights=torch.ones(tasks)),
    "COSMOS": lambda tasks: weighting.COSMOS(lambda_=1.0, weights=torch.ones(tasks)),
    "CurriculumSchedule": lambda tasks: weighting.CurriculumSchedule(list(range(tasks)), ramp=2, unit="update"),
    "AnnealingSchedule": lambda tasks: weighting.AnnealingSchedule([2.0] * tasks, [1.0] * tasks, 10, unit="update"),
}


def make_aggregator(name: str, tasks: int) -> Aggregator:
    """An aggregator of `mtlfast.aggregation` for so many tasks, by the name that `python -m mtlfast methods` shows.

    Raises:
        ValueError: there is none of that name.
    """
    return _make(name, tasks, AGGREGATORS, aggregation.FAMILIES)


def make_weighting(name: str, tasks: int) -> LossWeighting:
    """A weighting of `mtlfast.weighting` for so many tasks, by its name.

    Raises:
        ValueError: there is none of that name.
    """
    return _make(name, tasks, WEIGHTINGS, weighting.FAMILIES)


def _make(name, tasks, special, families):
    known = {method.__name__: method for methods in families.values() for method in methods}
    if name not in known:
        raise ValueError(f"{name!r} is none of {', '.join(known)}")
    if name in special:
        return special[name](tasks)
    takes_number = "num_tasks" in inspect.signature(known[name]).parameters
    return known[name](tasks) if takes_number else known[name]()
