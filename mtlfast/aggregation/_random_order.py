"""What methods that draw random numbers share."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._settings import Choice
from mtlfast.aggregation._base import GramAggregator


class Drawing(GramAggregator):
    """A method with a generator of its own, or torch's global one; `state_dict()` holds the generator's state."""

    def __init__(self, generator: torch.Generator | None) -> None:
        """Draws from `generator`, on the gradients' device; None: torch's global one."""
        super().__init__()
        self.generator = generator

    def get_extra_state(self) -> Tensor | None:
        """The generator's state, for `state_dict()`."""
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Restores the generator, from `load_state_dict()`."""
        if self.generator is not None and state is not None:
            self.generator.set_state(state)


class RandomOrder(Drawing):
    """A method in which each gradient meets the others one after another."""

    order = Choice("random", "fixed")

    def __init__(self, order: str, generator: torch.Generator | None) -> None:
        """'random': a fresh uniformly random order for each gradient at each call; 'fixed': ascending."""
        super().__init__(generator)
        self.order = order

    def keys(self, gram: Tensor) -> dict[str, Tensor]:
        """The solver's inputs: gradient i meets the others by ascending key [i, j]; none for ascending order."""
        if self.order == "fixed":
            return {}
        return {"keys": torch.rand(gram.shape, generator=self.generator, dtype=gram.dtype, device=gram.device)}
