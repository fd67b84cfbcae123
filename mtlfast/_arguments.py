"""What `mtlfast.backward` is given, checked: each check raises one sentence before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def refuse_ranks(allow_local: bool) -> None:
    distributed = torch.distributed
    if allow_local or not (distributed.is_available() and distributed.is_initialized()):
        return
    if (ranks := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"backward: {ranks} ranks are initialised, and surgery on each rank's own gradients lets replicas drift "
            "apart; expected one rank, or allow_local=True"
        )


def present_losses(losses: Sequence[Tensor | None] | Tensor) -> dict[int, Tensor]:
    """Task index -> loss, for the tasks that are there."""
    if isinstance(losses, Tensor) and losses.dim() != 1:
        raise ValueError(
            f"backward: losses is a tensor of shape {list(losses.shape)}, expected [K] or a list of scalars"
        )
    present: dict[int, Tensor] = {}
    for k, loss in enumerate(losses):
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"backward: loss {k} is a {type(loss).__name__}, expected a scalar Tensor or None")
        if loss.numel() != 1:
            raise ValueError(f"backward: loss {k} has shape {list(loss.shape)}, expected a scalar")
        if not loss.requires_grad:
            raise ValueError(f"backward: loss {k} does not require grad, expected one that depends on parameters")
        present[k] = loss.reshape(()) if loss.dim() else loss
    if not present:
        raise ValueError(f"backward: got {len(losses)} losses, none of them present, expected at least one")
    return present


def shared_parameters(shared: Iterable[Tensor]) -> list[Tensor]:
    """The shared parameters that want a gradient."""
    if isinstance(shared, Tensor):
        raise TypeError("backward: shared is a Tensor, expected a list of parameters")
    everything = list(shared)
    seen: dict[int, int] = {}
    for i, parameter in enumerate(everything):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"backward: shared {i} is a {type(parameter).__name__}, expected a parameter")
        if not parameter.is_leaf:
            raise ValueError(
                f"backward: shared {i} is the result of an operation, expected a parameter (a leaf tensor)"
            )
        if (earlier := seen.setdefault(id(parameter), i)) != i:
            raise ValueError(f"backward: shared {i} is shared {earlier} again, expected each parameter once")
    wanted = [parameter for parameter in everything if parameter.requires_grad]
    if not wanted:
        raise ValueError(
            f"backward: shared has {len(everything)} parameters, none that requires grad, expected at least one "
            "(a generator is empty after its first use)"
        )
    return wanted
