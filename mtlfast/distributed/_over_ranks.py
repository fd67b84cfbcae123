"""Finds out over which ranks a step is taken, from the arguments of `mtlfast.backward`."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtlfast._arguments import Shared, given_parameters, reusable
from mtlfast._sharded import sharded_parameters
from mtlfast.distributed._choose import Over
from mtlfast.distributed._ranks import Ranks


def stored_over_ranks(jacobian: str | None, mixing: Tensor | None) -> str:
    """The way over several ranks, where products of different ranks' gradients are needed, which only rows give.

    Raises:
        ValueError: another way was asked for.
    """
    if jacobian in ("implicit", "mixing"):
        raise ValueError(
            f"backward: jacobian is {jacobian!r} over several ranks, expected 'stored', because products of different "
            "ranks' gradients need the gradients"
        )
    if mixing is not None:
        raise ValueError("backward: got mixing= over several ranks, expected the losses of tasks")
    return "stored"


def over_ranks(shared: Shared | None, process_group: object, allow_local: bool) -> tuple[Over | None, Shared | None]:
    """Over which ranks `mtlfast.backward` takes its steps, or None for this rank alone; and the shared parameters.

    Raises:
        TypeError: `process_group` is neither a group nor a DistributedDataParallel module.
        RuntimeError: several ranks are initialised, and nothing says which of them train together.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise RuntimeError("backward: got process_group=, expected torch.distributed to be initialised")
        return None, shared
    module = next((x for x in (process_group, shared) if isinstance(x, DistributedDataParallel)), None)
    if isinstance(shared, DistributedDataParallel):
        shared = shared.module
    group: Any = process_group if module is None else module.process_group
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # what `new_group` returns on a rank that is not in it
        raise ValueError("backward: this rank is not in process_group, expected a group that it belongs to")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"backward: process_group is a {type(group).__name__}, expected a torch.distributed.ProcessGroup or a "
            "DistributedDataParallel module"
        )
    if allow_local:
        return None, shared
    _refuse_flat(shared)
    shared = None if shared is None else reusable(shared)
    sharded = None if module is not None and shared is None else _sharded(shared)  # a module knows what is whole
    if group is None and sharded is not None:
        group = dist.group.WORLD
    if group is None:
        if (number := dist.get_world_size()) > 1:
            raise RuntimeError(
                f"backward: {number} ranks are initialised, and surgery on each rank's own gradients lets replicas "
                "drift apart; expected process_group=, a DistributedDataParallel module as shared=, or allow_local=True"
            )
        return None, shared
    ranks = Ranks(group)
    if ranks.size == 1 and sharded is None:
        return None, shared
    return Over(ranks, module, sharded), shared


def _refuse_flat(shared: Shared | None) -> None:
    """Raises for a module of FSDP1, whose parameters are views of flat ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(shared, nn.Module):
        return
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in shared.modules()):
        raise ValueError(
            "backward: shared has a module under FullyShardedDataParallel (FSDP1), expected fully_shard (FSDP2)"
        )


def _sharded(shared: Shared | None) -> dict[int, Tensor] | None:
    """The sharded parameters, if the shared ones are sharded or may be."""
    if "torch.distributed.tensor" not in sys.modules:
        return None  # nothing has made a DTensor
    from torch.distributed.tensor import DTensor

    known = sharded_parameters()
    if shared is None:
        return known or None
    given = given_parameters(shared).parameters
    return known if any(isinstance(p, DTensor) or id(p) in known for p in given) else None
