"""What methods that draw random numbers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlfast._settings import Choice
from mtlfast.aggregation._base import GramAggregator
from mtlfast.aggregation._step import Step


class Drawing(GramAggregator):
    """A method with a generator of its own, or torch's global one; `state_dict()` holds the generator's state."""

    generator: torch.Generator | None

    def __init__(self, generator: torch.Generator | None) -> None:
        """Draws from `generator`, on the gradients' device; None: torch's global one."""
        super().__init__()
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{type(self).__name__}: generator is a {type(generator).__name__}, expected a torch.Generator or None"
            )
        self.generator = generator

    def get_extra_state(self) -> Tensor:
        """The generator's state, for `state_dict()`, which holds tensors alone: an empty one without a generator."""
        return torch.empty(0, dtype=torch.uint8) if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Restores the generator, from `load_state_dict()`."""
        if self.generator is not None and state is not None and state.numel() > 0:
            self.generator.set_state(state.cpu())  # host: where a generator's state lives

    def _remember(self) -> Callable[[], None]:
        """The generator's state as well, but during a capture, where it cannot be read."""
        back, generator = super()._remember(), self.generator
        if generator is None or (generator.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return back
        numbers = generator.get_state()

        def both() -> None:
            back()
            generator.set_state(numbers)

        return both

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which a generator itself does not allow: its device and its state."""
        state = self.__dict__.copy()
        if self.generator is not None:
            state["generator"] = (self.generator.device, self.generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles: a generator of its own that goes on where the copied one was."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.generator is not None:
            device, numbers = state["generator"]
            self.generator = torch.Generator(device)
            self.generator.set_state(numbers)


class RandomOrder(Drawing):
    """A method in which each gradient meets the others one after another."""

    order = Choice("random", "fixed")

    def __init__(self, order: str, generator: torch.Generator | None) -> None:
        """'random': a fresh uniformly random order for each gradient at each call; 'fixed': ascending."""
        super().__init__(generator)
        self.order = order

    def keys(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The solver's inputs: gradient i meets the others by ascending key [i, j]; none for ascending order."""
        if self.order == "fixed" or not step.training:
            return {}
        return {"keys": torch.rand(gram.shape, generator=self.generator, dtype=gram.dtype, device=gram.device)}
