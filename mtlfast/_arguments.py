"""Brings the arguments of `mtlfast.backward` to one form. An argument that does not fit raises before any work."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtlfast.aggregation import Aggregator
from mtlfast.task_gradients import DTYPES
from mtlfast.weighting import LossWeighting

Losses = Mapping[str, Tensor | None] | Iterable[Tensor | None] | Tensor
Shared = nn.Module | Mapping[str, Tensor] | Iterable[Tensor | nn.Module | tuple[str, Tensor]]


class Present(NamedTuple):
    """The tasks that are present in one step.

    Attributes:
        number: the number of all tasks, present or not.
        tasks: the indices of the present tasks.
        losses: the losses of the present tasks, without dimensions.
    """

    number: int
    tasks: tuple[int, ...]
    losses: list[Tensor]


class Columns(NamedTuple):
    """The shared parameters, which are the columns of the Jacobian.

    Attributes:
        names: the names by which errors call them.
        parameters: leaf tensors, each once.
    """

    names: list[str]
    parameters: list[Tensor]


def check_methods(aggregator: Aggregator, weighting: LossWeighting | None) -> None:
    """Raises unless both are instances of their base classes."""
    wanted = "mtlfast.aggregation.Aggregator"
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"backward: aggregator {_is_no_instance(aggregator, Aggregator, wanted)}")
    wanted = "mtlfast.weighting.LossWeighting"
    if weighting is not None and not isinstance(weighting, LossWeighting):
        raise TypeError(f"backward: weighting {_is_no_instance(weighting, LossWeighting, wanted)}")


def _is_no_instance(value: object, base: type, expected: str) -> str:
    if inspect.isclass(value) and issubclass(value, base):
        return f"is the class {value.__name__}, expected an instance, as {value.__name__}() makes one"
    return f"is a {type(value).__name__}, expected a {expected}"


def refuse_ranks(caller: str, allow_local: bool) -> None:
    """Raises if several ranks are initialised, unless the user allows each rank to aggregate its own gradients."""
    distributed = torch.distributed
    if allow_local or not (distributed.is_available() and distributed.is_initialized()):
        return
    if (ranks := distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"{caller}: {ranks} ranks are initialised, and surgery on each rank's own gradients lets replicas drift "
            "apart; expected one rank, or allow_local=True"
        )


def present_losses(losses: Losses, caller: str = "backward", what: str = "loss", may_be_absent: bool = True) -> Present:
    """The present tasks, from any form that losses may have. `what` is what the caller's errors call a loss."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    or_none = " or None" if may_be_absent else ""
    if isinstance(losses, Tensor) and losses.dim() != 1:
        raise ValueError(
            f"{caller}: {plural} is a tensor of shape {list(losses.shape)}, expected [K] or a list of scalars"
        )
    try:
        named = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
    except TypeError:
        raise TypeError(f"{caller}: {plural} is a {type(losses).__name__}, expected a list of scalars") from None
    present: dict[int, Tensor] = {}
    for k, (name, loss) in enumerate(named.items()):
        if loss is None and may_be_absent:
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"{caller}: {what} {name} is a {type(loss).__name__}, expected a scalar Tensor{or_none}")
        if loss.numel() != 1:
            raise ValueError(f"{caller}: {what} {name} has shape {list(loss.shape)}, expected a scalar")
        if loss.is_complex():
            raise TypeError(f"{caller}: {what} {name} has dtype {loss.dtype}, expected a real one")
        if not loss.requires_grad:
            raise ValueError(
                f"{caller}: {what} {name} does not require grad, expected one that depends on parameters"
                + (", or None for a task that is absent" if may_be_absent else "")
            )
        present[k] = loss.reshape(()) if loss.dim() else loss
    if not named and not may_be_absent:
        raise ValueError(f"{caller}: got no {plural}, expected at least one")
    if not present:
        raise ValueError(f"{caller}: got {len(named)} {plural}, none of them present, expected at least one")
    return Present(len(named), tuple(present), list(present.values()))


def shared_parameters(shared: Shared) -> Columns:
    """The shared parameters that require grad, from any form that `shared` may have."""
    if shared is None:
        raise TypeError("backward: shared is None, expected the parameters that tasks share, as trunk.parameters()")
    if isinstance(shared, Tensor):
        raise TypeError("backward: shared is a Tensor, expected a list of parameters")
    everything = list(_named(shared))
    seen: dict[int, str] = {}
    for name, parameter in everything:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"backward: {name} is a {type(parameter).__name__}, expected a parameter")
        if not parameter.is_leaf:
            raise ValueError(f"backward: {name} is the result of an operation, expected a parameter (a leaf tensor)")
        if id(parameter) in seen:
            raise ValueError(f"backward: {name} is the same parameter as {seen[id(parameter)]}, expected each once")
        seen[id(parameter)] = name
    wanted = [(name, parameter) for name, parameter in everything if parameter.requires_grad]
    if not wanted:
        if not everything:
            raise ValueError(
                "backward: shared has no parameters, expected at least one (a generator is empty after its first use)"
            )
        raise ValueError(
            f"backward: none of the {len(everything)} shared parameters requires grad, expected at least one (heads "
            "alone are trained by sum(losses).backward())"
        )
    first, device = wanted[0][0], wanted[0][1].device
    for name, parameter in wanted:
        if parameter.dtype not in DTYPES:
            expected = "float32, float64, bfloat16 or float16"
            raise TypeError(f"backward: {name} has dtype {parameter.dtype}, expected {expected}")
        if parameter.device != device:
            raise ValueError(f"backward: {name} is on {parameter.device}, expected {device} as {first}")
    return Columns([name for name, _ in wanted], [parameter for _, parameter in wanted])


def _named(shared: Shared) -> Iterable[tuple[str, Tensor]]:
    """Each entry with its name: a module's name for its parameter, otherwise its place in the list."""
    if isinstance(shared, nn.Module):
        yield from shared.named_parameters()
        return
    if isinstance(shared, Mapping):
        yield from ((str(name), parameter) for name, parameter in shared.items())
        return
    try:
        entries: Sequence[object] = list(shared)
    except TypeError:
        raise TypeError(
            f"backward: shared is a {type(shared).__name__}, expected a list of parameters or a module"
        ) from None
    owners: dict[int, str] = {}
    for i, entry in enumerate(entries):
        if isinstance(entry, Tensor):
            yield f"shared {i}", entry
        elif isinstance(entry, nn.Module):
            for name, parameter in entry.named_parameters():
                if owners.setdefault(id(parameter), f"{i}.{name}") == f"{i}.{name}":  # modules may share one
                    yield f"{i}.{name}", parameter
        elif isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):  # of named_parameters()
            yield entry
        else:
            yield f"shared {i}", entry  # type: ignore[misc]  # the caller refuses what is not a parameter
