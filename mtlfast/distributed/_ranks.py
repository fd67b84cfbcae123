"""The ranks that train replicas together, and the collectives between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_step = 0  # how many steps this process has taken with others


def begin_step() -> None:
    """Counts one more step, whose number errors then give."""
    global _step
    _step += 1


def step_number() -> int:
    """The number of the step that began last."""
    return _step


# torch 2.13 has new names for these two, and the old ones warn.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Started:
    """A collective that runs beside the computation until `wait` returns.

    Args:
        ranks: between which ranks.
        what: what errors call it.
        work: what torch returned.
    """

    def __init__(self, ranks: Ranks, what: str, work: Any) -> None:
        self._ranks, self._what, self._work = ranks, what, work

    def wait(self) -> None:
        """Waits until the result can be used, on a GPU by the current stream alone."""
        with self._ranks.named(self._what):
            self._work.wait()


class Ranks:
    """The ranks of a process group during one step. Its collectives are in the same order on all of them.

    A collective that fails, because a rank died or did not come within the group's timeout, raises an error that names
    the collective and the step.

    Args:
        group: the process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.failed = False  # whether a collective did

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Within it an error of torch names the collective and the step."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            self.failed = True
            raise RuntimeError(
                f"backward: {what} failed in step {step_number()} on rank {self.rank} of {self.size}, expected all "
                f"ranks to take part in it ({str(error).splitlines()[0]})"
            ) from error

    def host_device(self, device: torch.device) -> torch.device:
        """Where small values are exchanged that the host reads: the CPU if the group can, else the given device."""
        return torch.device("cpu") if "cpu" in dist.get_backend_config(self.group) else device

    def sum(self, what: str, values: Tensor) -> Tensor:
        """The sum of all ranks' values, in the memory of `values`, which must be contiguous."""
        with self.named(what):
            dist.all_reduce(values, group=self.group)
        return values

    def start_sum(self, what: str, values: Tensor) -> Started:
        """The same, beside the computation."""
        with self.named(what):
            return Started(self, what, dist.all_reduce(values, group=self.group, async_op=True))

    def gather(self, what: str, values: Tensor) -> Tensor:
        """All ranks' values, [N, ...], which must have one shape."""
        everyone = values.new_empty((self.size * len(values), *values.shape[1:]))
        with self.named(what):
            _all_gather(everyone, values, group=self.group)
        return everyone.view(self.size, *values.shape)

    def start_scatter(self, what: str, values: Tensor, own: Tensor) -> Started:
        """The sums over all ranks of `values` [N * n], of which each rank gets its n elements in `own`."""
        with self.named(what):
            return Started(self, what, _reduce_scatter(own, values.view(-1), group=self.group, async_op=True))

    def from_first(self, what: str, values: Tensor) -> Tensor:
        """The values of rank 0 of the group, in the memory of `values`."""
        with self.named(what):
            dist.broadcast(values, dist.get_global_rank(self.group, 0), group=self.group)
        return values
