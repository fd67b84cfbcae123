"""`methods` and `weightings`: all aggregators and loss weightings by name, ready to use."""

from collections.abc import Callable
from functools import partial

import torch

from mtlfast import aggregation, weighting
from mtlfast._settings import Whole
from mtlfast.aggregation import Aggregator, Reads, Step
from mtlfast.weighting import LossWeighting


def methods(num_tasks: int) -> dict[str, Callable[[], Aggregator]]:
    """Every aggregator that `mtlfast.backward` can use with so many tasks, by name.

    Each has its default settings, or those of its `for_tasks` if its constructor needs arguments. Methods that need the
    gradients of two batches, or another number of tasks, are left out.

    Args:
        num_tasks: K, at least 1.

    Returns:
        A dict from the class's name to a function that makes a new aggregator, in the order of `python -m mtlfast
        methods`.

    Raises:
        ValueError: `num_tasks` is not an integer of at least 1.

    Example:
        >>> import mtlfast
        >>> make = mtlfast.methods(num_tasks=2)
        >>> make["PCGrad"]()
        PCGrad(reduction='sum', order='random')
    """
    _check("methods", num_tasks)
    known = (kind for family in aggregation.FAMILIES.values() for kind in family)
    return {kind.__name__: partial(kind.for_tasks, num_tasks) for kind in known if _drivable(kind, num_tasks)}


def weightings(num_tasks: int) -> dict[str, Callable[[], LossWeighting]]:
    """Every loss weighting for so many tasks, by name.

    Each has its default settings, or those of its `for_tasks` if its constructor needs more than the number of tasks.

    Args:
        num_tasks: n, at least 1.

    Returns:
        A dict from the class's name to a function that makes a new weighting, in the order of `python -m mtlfast
        methods`.

    Raises:
        ValueError: `num_tasks` is not an integer of at least 1.
    """
    _check("weightings", num_tasks)
    known = (kind for family in weighting.FAMILIES.values() for kind in family)
    return {kind.__name__: partial(kind.for_tasks, num_tasks) for kind in known}


def _check(caller: str, num_tasks: int) -> None:
    if not Whole(1).holds(num_tasks):
        raise ValueError(f"{caller}: num_tasks is {num_tasks!r}, expected an integer of at least 1")


def _drivable(kind: type[Aggregator], num_tasks: int) -> bool:
    """Whether the method works with the gradients of one batch and of so many tasks."""
    aggregator = kind.for_tasks(num_tasks)
    try:
        aggregator.check(Step(num_tasks, losses=torch.ones(num_tasks)))
    except ValueError:
        return False
    return aggregator.reads is not Reads.CROSS_GRAM
