"""What a method's twin is given."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

# The first numbers of a state count, for the methods that keep a state and say so: solves that gave up, and solves that
# took something for zero since it is no larger than rounding.
UNCONVERGED, BY_NOISE = 0, 1


class Group(NamedTuple):
    """One Gram matrix's problem: the K gradients themselves, or any rows with the same products."""

    matrix: Tensor  # [K, P] float64
    params: Mapping[str, float] = MappingProxyType({})
    inputs: Mapping[str, Tensor] = MappingProxyType({})  # those that there are
    state: Tensor | None = None  # changed in place
    tasks: Sequence[int] | None = None
    cross: Tensor | None = None  # [K, K], the products of two batches, for the methods that read those

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.matrix)

    @property
    def present(self) -> Sequence[int]:
        """The tasks' indices in the state."""
        return range(self.num_tasks) if self.tasks is None else self.tasks

    def place(self, task: int) -> int:
        """Where a task stands among the K; that of the first for one that is not there."""
        return list(self.present).index(task) if task in self.present else 0

    def tally(self, counter: int, happened: bool) -> None:
        """Counts a solve, if there is a state that holds the counter."""
        if happened and self.state is not None and counter < self.state.numel():
            self.state[counter] += 1

    def preferences(self) -> Tensor:
        """The input of that name, or 1/K each."""
        equal = torch.full_like(self.matrix[:, 0], 1 / self.num_tasks)
        return self.inputs.get("preferences", equal)

    def loss_scale(self) -> float:
        """The input of that name, one number, or 1."""
        return float(self.inputs.get("loss_scale", 1.0))

    def orders(self, itself: bool = False) -> list[list[int]]:
        """The other tasks of each, and with `itself` its own, by ascending key, if there are keys, and index."""
        K = self.num_tasks
        keys = self.inputs.get("keys", torch.zeros(K, K))
        return [[j for j in row.argsort(stable=True).tolist() if itself or j != i] for i, row in enumerate(keys)]
