"""Refuses sharded parameters, because autograd makes no gradient of the whole parameter for them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def refuse_sharded(
    caller: str, names: Sequence[str], parameters: Sequence[Tensor], leaves: Iterable[Tensor] = ()
) -> None:
    """Raises if a parameter is a DTensor or belongs to a module under `fully_shard`.

    Args:
        caller: the name that the error begins with.
        names: the names by which the error calls the parameters.
        parameters: leaf tensors.
        leaves: other leaf tensors that get a gradient, without names.

    Raises:
        ValueError: one is sharded.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return  # without a process group there is no sharded parameter
    from torch.distributed.tensor import DTensor

    gathered = _gathered()
    named = [*zip(names, parameters, strict=True), *(("a parameter that the losses reach", leaf) for leaf in leaves)]
    for name, parameter in named:
        if isinstance(parameter, DTensor) or id(parameter) in gathered:
            raise ValueError(
                f"{caller}: {name} is sharded over processes (a DTensor, as fully_shard makes them), expected whole "
                "parameters"
            )


def _gathered() -> set[int]:
    """The parameters that modules under `fully_shard` (FSDP2) hold while they are gathered, as plain tensors."""
    return {id(parameter) for module in fully_sharded_modules() for parameter in module.parameters()}


def fully_sharded_modules() -> list[Any]:
    """All modules under `fully_shard` (FSDP2)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    return [] if fsdp is None else [module for module in list(states) if isinstance(module, fsdp.FSDPModule)]


def sharded_parameters() -> dict[int, Tensor]:
    """The sharded parameter of each parameter that a module under `fully_shard` holds, sharded or gathered, by its id.

    While a module's parameters are gathered, the graph and `module.parameters()` know plain tensors in their place.
    """
    found: dict[int, Tensor] = {}
    for module in fully_sharded_modules():
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                sharded = parameter.sharded_param
                found[id(sharded)] = found[id(getattr(parameter, "_unsharded_param", sharded))] = sharded
    return found
