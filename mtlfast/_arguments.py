"""Brings the arguments of `mtlfast.backward` to one form. An argument that does not fit raises before any work."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtlfast._sharded import sharded_parameters
from mtlfast.aggregation import Aggregator
from mtlfast.task_gradients import DTYPES
from mtlfast.weighting import LossWeighting

Shared = nn.Module | Mapping[str, Tensor] | Iterable[Tensor | nn.Module | tuple[str, Tensor]]


class Columns(NamedTuple):
    """The shared parameters, which are the columns of the Jacobian.

    Attributes:
        names: the names by which errors call them.
        parameters: leaf tensors, each once.
    """

    names: list[str]
    parameters: list[Tensor]


def check_methods(aggregator: Aggregator, weighting: LossWeighting | None, caller: str = "backward") -> None:
    """Raises unless both are instances of their base classes."""
    wanted = "mtlfast.aggregation.Aggregator"
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"{caller}: aggregator {is_no_instance(aggregator, Aggregator, wanted)}")
    wanted = "mtlfast.weighting.LossWeighting"
    if weighting is not None and not isinstance(weighting, LossWeighting):
        raise TypeError(f"{caller}: weighting {is_no_instance(weighting, LossWeighting, wanted)}")


def is_no_instance(value: object, base: type, expected: str, arguments: str = "") -> str:
    """The rest of an error about a value that is no instance of `base`. `arguments` is what its constructor takes."""
    if inspect.isclass(value) and issubclass(value, base):
        return f"is the class {value.__name__}, expected an instance, as {value.__name__}({arguments}) makes one"
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


def reusable(shared: Shared) -> Shared:
    """`shared` in a form that can be read more than once, as a generator cannot."""
    return list(shared) if isinstance(shared, Iterator) else shared


def shared_parameters(shared: Shared, caller: str = "backward") -> Columns:
    """The shared parameters that require grad, from any form that `shared` may have."""
    return trained(given_parameters(shared, caller), caller)


def given_parameters(shared: Shared, caller: str = "backward") -> Columns:
    """All parameters of `shared`, also those that do not require grad.

    Raises:
        ValueError, TypeError: one is not a leaf tensor, or comes twice.
    """
    if isinstance(shared, Tensor):
        raise TypeError(f"{caller}: shared is a Tensor, expected a list of parameters")
    everything = list(_named(shared, caller))
    seen: dict[int, str] = {}
    for name, parameter in everything:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{caller}: {name} is a {type(parameter).__name__}, expected a parameter")
        if not parameter.is_leaf:
            raise ValueError(f"{caller}: {name} is the result of an operation, expected a parameter (a leaf tensor)")
        if id(parameter) in seen:
            raise ValueError(f"{caller}: {name} is the same parameter as {seen[id(parameter)]}, expected each once")
        seen[id(parameter)] = name
    return Columns([name for name, _ in everything], [parameter for _, parameter in everything])


def trained(given: Columns, caller: str = "backward") -> Columns:
    """Those of the given parameters that require grad.

    Raises:
        ValueError, TypeError: there are none, or their gradients cannot be held.
    """
    wanted = [(name, parameter) for name, parameter in zip(*given, strict=True) if parameter.requires_grad]
    if not wanted:
        if not given.parameters:
            raise ValueError(
                f"{caller}: shared has no parameters, expected at least one (a generator is empty after its first use)"
            )
        raise ValueError(
            f"{caller}: none of the {len(given.parameters)} shared parameters requires grad, expected at least one "
            "(heads alone are trained by sum(losses).backward())"
        )
    return check_columns(Columns([name for name, _ in wanted], [parameter for _, parameter in wanted]), caller)


def found_parameters(leaves: Sequence[Tensor], caller: str = "backward") -> Columns:
    """The shared parameters where none were given: the leaves that more than one loss reaches.

    Raises:
        ValueError: there are none.
    """
    if not leaves:
        raise ValueError(
            f"{caller}: no parameter is reached by more than one of the losses, expected shared= to say which "
            "parameters the tasks share"
        )
    names = [f"a shared parameter of shape {list(leaf.shape)}" for leaf in leaves]
    return check_columns(Columns(names, list(leaves)), caller)


def refuse_both(what: str, given: Mapping[str, object], excluded: Iterable[str]) -> None:
    """Raises if an argument is given that does not go together with another.

    Args:
        what: that other argument.
        given: the arguments' values by name; None: not given.
        excluded: the names of those that do not go together with it.
    """
    for name in excluded:
        if given[name] is not None:
            raise ValueError(f"backward: got {name}= beside {what}, expected one of them")


def norm_layers(weighting: LossWeighting | None, columns: Sequence[Tensor]) -> list[Tensor] | None:
    """The shared parameters at which a weighting reads the norms of the gradients; None: all.

    Args:
        weighting: its `layers` are parameters, or None.
        columns: the shared parameters, or features; empty if they are not known yet.

    Raises:
        ValueError: a layer that requires grad is not among them, or none requires grad.
    """
    if weighting is None or not weighting.reads_norms or weighting.layers is None:
        return None
    name, known = type(weighting).__name__, {id(column) for column in columns}
    if columns and not all(column.is_leaf for column in columns):
        raise ValueError(f"{name}: layers are parameters, expected layers=None as the gradients are those of features")
    sharded = sharded_parameters()
    given = [sharded.get(id(layer), layer) for layer in weighting.layers]
    layers = [layer for layer in given if layer.requires_grad]
    if not layers:
        raise ValueError(f"{name}: none of the layers requires grad, expected at least one")
    for i, layer in enumerate(given):
        if known and layer.requires_grad and id(layer) not in known:
            raise ValueError(
                f"{name}: layer {i}, of shape {list(layer.shape)}, is not in shared, expected shared parameters alone"
            )
    return layers


def check_columns(columns: Columns, caller: str = "backward") -> Columns:
    """Raises unless task gradients of these tensors can be held."""
    (first, *_), (example, *_) = columns
    for name, parameter in zip(*columns, strict=True):
        if parameter.dtype not in DTYPES:
            expected = "float32, float64, bfloat16 or float16"
            raise TypeError(f"{caller}: {name} has dtype {parameter.dtype}, expected {expected}")
        if parameter.is_meta != example.is_meta:  # gradients on meta have no values
            raise ValueError(f"{caller}: {name} is on {parameter.device}, expected {example.device} as {first}")
    return columns


def _named(shared: Shared, caller: str) -> Iterable[tuple[str, Tensor]]:
    """Each entry with its name: a module's name for its parameter, otherwise its place in the list."""
    if isinstance(shared, nn.Module):
        yield from shared.named_parameters()
        return
    if isinstance(shared, Mapping):
        yield from ((str(name), parameter) for name, parameter in shared.items())
        return
    try:
        iterator = iter(shared)
    except TypeError:
        raise TypeError(
            f"{caller}: shared is a {type(shared).__name__}, expected a list of parameters or a module"
        ) from None
    entries: list[object] = list(iterator)  # an error inside a generator is the user's
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
