"""Aggregators and loss weightings by name, ready to use."""

from collections.abc import Callable
from functools import partial

import torch

from mtlfast import aggregation, weighting
from mtlfast._settings import Whole
from mtlfast.aggregation import Aggregator, Reads, Step
from mtlfast.weighting import LossWeighting


def methods(num_tasks: int) -> dict[str, Callable[[], Aggregator]]:
    """Every aggregator that `mtlfast.backward` can drive with so many tasks, by name.

    The settings are each method's defaults; where its constructor needs more, those of its `for_tasks`. Methods of two
    batches, and of another number of tasks, are left out.

    Args:
        num_tasks: K, at least 1.

    Returns:
        The class's name -> a call that makes a new one, in the order of `python -m mtlfast methods`.

    Raises:
        ValueError: `num_tasks` is no such number.
    """
    _check("methods", num_tasks)
    known = (kind for family in aggregation.FAMILIES.values() for kind in family)
    return {kind.__name__: partial(kind.for_tasks, num_tasks) for kind in known if _drivable(kind, num_tasks)}


def weightings(num_tasks: int) -> dict[str, Callable[[], LossWeighting]]:
    """Every loss weighting by name, for so many tasks, with settings as those of `methods`.

    Args:
        num_tasks: n, at least 1.

    Returns:
        The class's name -> a call that makes a new one, in the order of `python -m mtlfast methods`.

    Raises:
        ValueError: `num_tasks` is no such number.
    """
    _check("weightings", num_tasks)
    known = (kind for family in weighting.FAMILIES.values() for kind in family)
    return {kind.__name__: partial(kind.for_tasks, num_tasks) for kind in known}


def _check(caller: str, num_tasks: int) -> None:
    if not Whole(1).holds(num_tasks):
        raise ValueError(f"{caller}: num_tasks is {num_tasks!r}, expected an integer of at least 1")


def _drivable(kind: type[Aggregator], num_tasks: int) -> bool:
    """Does it work with one batch's gradients, of so many tasks?"""
    aggregator = kind.for_tasks(num_tasks)
    try:
        aggregator.check(Step(num_tasks, losses=torch.ones(num_tasks)))
    except ValueError:
        return False
    return aggregator.reads is not Reads.CROSS_GRAM
