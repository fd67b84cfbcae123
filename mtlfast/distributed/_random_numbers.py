"""The same random numbers on all ranks, for methods that draw an order of the tasks or a mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mtlfast.distributed._ranks import Ranks


@contextmanager
def same_random_numbers(ranks: Ranks, method: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it all ranks draw what rank 0 draws, and so what a single process would draw.

    Torch's global generators of the other ranks are afterwards where they were, so that dropout and data loading stay
    different from rank to rank. A method's own generator is afterwards where that of rank 0 is.

    Args:
        ranks: the ranks.
        method: an aggregator or a weighting.
        device: where numbers are drawn.
    """
    own = {id(g): g for m in method.modules() if (g := getattr(m, "generator", None)) is not None}
    shared = [torch.default_generator]
    if device.type == "cuda":
        shared.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in shared]
    try:
        for generator in (*shared, *own.values()):
            where = ranks.host_device(device)
            state = ranks.from_first("the exchange of random states", generator.get_state().to(where))
            if ranks.rank > 0:
                generator.set_state(state.cpu())
        yield
    finally:
        if ranks.rank > 0:
            for generator, state in zip(shared, before, strict=True):
                generator.set_state(state)


def draws(method: nn.Module) -> bool:
    """Whether a method may draw random numbers. One that is not of this package may."""
    return any(
        hasattr(module, "generator") or getattr(module, "draws", not type(module).__module__.startswith("mtlfast."))
        for module in method.modules()
    )
