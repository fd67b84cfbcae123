"""The base classes of methods that draw random numbers, and of those that draw an order of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlfast._settings import Choice
from mtlfast.aggregation._base import Aggregator
from mtlfast.aggregation._step import Step


class HasGenerator(Aggregator):
    """A method that draws random numbers from its own generator or from torch's global one.

    `state_dict()` holds the state of its own generator.
    """

    generator: torch.Generator | None

    def __init__(self, generator: torch.Generator | None) -> None:
        """`generator` must be on the gradients' device; None: torch's global generator."""
        super().__init__()
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{type(self).__name__}: generator is a {type(generator).__name__}, expected a torch.Generator or None"
            )
        self.generator = generator

    def get_extra_state(self) -> Tensor:
        """The generator's state for `state_dict()`; an empty tensor if the method has no generator of its own."""
        return torch.empty(0, dtype=torch.uint8) if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Tensor | None) -> None:
        """Restores the generator's state, which `load_state_dict()` read."""
        if self.generator is not None and state is not None and state.numel() > 0:
            self.generator.set_state(state.cpu())  # host: where a generator's state lives

    def _remember(self) -> Callable[[], None]:
        """Remembers the generator's state as well, except during a CUDA graph capture, where it cannot be read."""
        back, generator = super()._remember(), self.generator
        if generator is None or (generator.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return back
        numbers = generator.get_state()

        def both() -> None:
            back()
            generator.set_state(numbers)

        return both

    def __getstate__(self) -> dict[str, Any]:
        """A generator can be neither copied nor pickled, so its device and its state take its place."""
        state = self.__dict__.copy()
        if self.generator is not None:
            state["generator"] = (self.generator.device, self.generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The copy gets a new generator, which continues where the copied one stood."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.generator is not None:
            device, numbers = state["generator"]
            self.generator = torch.Generator(device)
            self.generator.set_state(numbers)


class RandomOrder(HasGenerator):
    """A method that takes each gradient through the others one after another, in an order of its own."""

    order = Choice("random", "fixed")

    def __init__(self, order: str, generator: torch.Generator | None) -> None:
        """`order` is "random" (each call draws a uniformly random order for each gradient) or "fixed" (ascending)."""
        super().__init__(generator)
        self.order = order

    def keys(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The solver's inputs: gradient i meets gradient j by ascending key [..., i, j]; no keys for "fixed"."""
        if self.order == "fixed" or not step.training:
            return {}
        return {"keys": torch.rand(gram.shape, generator=self.generator, dtype=gram.dtype, device=gram.device)}
