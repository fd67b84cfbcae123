"""`Shards`: says of task gradients that they hold one rank's part of each parameter's elements."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Shards(Protocol):
    """What methods need to know that work element by element, on the part of the elements that this rank holds."""

    @property
    def numel(self) -> int:
        """The number of elements of one task's gradient on all ranks together."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of values that each rank computed from its own elements."""

    def indices(self, t: int) -> Tensor:
        """int64, with the shape of this rank's tensor t: each element's index among all elements of all parameters."""

    def own(self, t: int, whole: Tensor) -> Tensor | None:
        """This rank's part of what is known for parameter t as a whole; None if `whole` has another number."""

    def saved(self, t: int, own: Tensor) -> Tensor:
        """This rank's part as a DTensor, which torch.distributed.checkpoint saves and others can read as a whole."""
