"""The one table of methods with state for each parameter: how each is made, and its twin in plain PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlfast.aggregation import DBMTL, Bloop, ExcessMTL, MoCo, PseudoMomentum
from mtlfast.aggregation._keeps_state import KeepsState
from mtlfast.reference import parameter_state as twins

TASKS = 3  # of a method that is made for a number of tasks


@dataclass(frozen=True)
class Stateful:
    """A row of the table.

    Attributes:
        make: the method, with settings by name such as `state_dtype`.
        twin: its twin for so many tasks and elements.
        scale_free: whether a factor of all gradients and losses is a factor of the direction.
    """

    make: Callable[..., KeepsState]
    twin: Callable[[int, int], Any]
    scale_free: bool = True


METHODS = {
    "MoCo": Stateful(MoCo, lambda n, numel: twins.MoCo(n, numel, 0.5, 0.1, 0.0), scale_free=False),
    "MoCo, fast": Stateful(
        lambda **more: MoCo(beta=0.9, gamma=2.0, rho=0.3, **more),
        lambda n, numel: twins.MoCo(n, numel, 0.9, 2.0, 0.3),
        scale_free=False,
    ),
    "DBMTL": Stateful(DBMTL, lambda n, numel: twins.DBMTL(n, numel, 0.9, 0.0), scale_free=False),
    "DBMTL, falling": Stateful(
        lambda **more: DBMTL(0.7, 0.5, **more), lambda n, numel: twins.DBMTL(n, numel, 0.7, 0.5), scale_free=False
    ),
    "ExcessMTL": Stateful(ExcessMTL, lambda n, numel: twins.ExcessMTL(n, numel, 1.0, 0), scale_free=False),
    "ExcessMTL, warm-up": Stateful(
        lambda **more: ExcessMTL(0.3, 2, **more), lambda n, numel: twins.ExcessMTL(n, numel, 0.3, 2), scale_free=False
    ),
    "PseudoMomentum": Stateful(
        lambda **more: PseudoMomentum(TASKS, **more),
        lambda n, numel: twins.PseudoMomentum(n, numel, 0.9, 0.999),
        scale_free=False,
    ),
    "Bloop": Stateful(Bloop, lambda n, numel: twins.Bloop(n, numel, 0.1, 0.1, 0)),
    "Bloop, task 1": Stateful(
        lambda **more: Bloop(0.5, 0.3, 1, **more), lambda n, numel: twins.Bloop(n, numel, 0.5, 0.3, 1)
    ),
}


def losses(tasks: Sequence[int] = range(TASKS), step: int = 0) -> Tensor:
    """Positive losses, others for each task and step."""
    return torch.tensor([1.0 + 0.3 * task + 0.1 * (step % 3) for task in tasks], dtype=torch.float64)
