"""Groups of shared parameters, each of which gets a surgery of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from mtlfast._arguments import Columns, Shared
from mtlfast._sharded import sharded_parameters
from mtlfast.aggregation import Groups
from mtlfast.distributed._features import FeaturesOfRanks
from mtlfast.jacobian import FeaturesJacobian, Jacobian

# What `groups=` takes.
GroupsArgument = (
    str
    | int
    | Optimizer
    | Callable[[str], str]
    | Mapping[str, str | Tensor | nn.Module | Iterable[str | Tensor | nn.Module]]
    | Iterable[str | type[nn.Module]]
)

FORMS = '"tensor", "module", "lora", a depth, module names or classes, an optimizer, a dict or a function of a name'
FOUND = re.compile(r"a shared parameter of shape .*")  # the name of a parameter that only the graph knows
POSITION = re.compile(r"shared \d+")  # and of one in a list
LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def partition(groups: GroupsArgument | None, shared: Shared | None, jacobian: Jacobian) -> Groups | None:
    """What `groups=` of `mtlfast.backward` means; None without it, or if the parameters are not known yet.

    Raises:
        ValueError, TypeError: as `groups_of`, or surgery is at features.
    """
    if groups is None:
        return None
    if isinstance(jacobian, FeaturesJacobian | FeaturesOfRanks):
        raise ValueError("backward: got groups= beside at, expected one of them")
    return groups_of(groups, shared, jacobian.columns) if jacobian.columns.names else None


def groups_of(groups: GroupsArgument, shared: Shared | None, columns: Columns) -> Groups:
    """The partition of given parameters.

    Args:
        groups: as the user gave it.
        shared: what the user gave as shared, whose modules are searched for module classes.
        columns: the shared parameters that require grad.

    Raises:
        ValueError, TypeError: `groups` is of no known form, names something that there is not, or puts a shared
            parameter into no group or into two.
    """
    if isinstance(groups, str):
        return _by_word(groups, columns)
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 1:
            raise ValueError(f"backward: groups is {groups}, expected a depth of at least 1")
        return _by_name(columns, lambda name: ".".join(name.split(".")[:-1][:groups]) or name)
    if isinstance(groups, Optimizer):
        of_optimizer = {f"group {i}": list(group["params"]) for i, group in enumerate(groups.param_groups)}
        return _partition(columns, of_optimizer)
    if isinstance(groups, Mapping):
        return _partition(columns, {str(name): _members(given, name, columns) for name, given in groups.items()})
    if callable(groups) and not isinstance(groups, type | nn.Module):
        return _by_name(columns, groups)
    if isinstance(groups, type) and issubclass(groups, nn.Module):
        name = groups.__name__
        raise TypeError(f"backward: groups is the class {name}, expected a list of classes such as [{name}]")
    if isinstance(groups, nn.Module):
        name = type(groups).__name__
        raise TypeError(f"backward: groups is a {name}, expected a list of module names, or a dict of modules by name")
    if isinstance(groups, bool | type | Tensor) or not isinstance(groups, Iterable):
        raise TypeError(f"backward: groups is a {type(groups).__name__}, expected {FORMS}")
    return _partition(columns, _by_module(list(groups), shared, columns))


def _by_word(word: str, columns: Columns) -> Groups:
    if word == "tensor":
        unique = len(set(columns.names)) == len(columns.names)
        names = columns.names if unique else [f"tensor {t}" for t in range(len(columns.names))]
        return Groups(tuple(names), tuple(range(len(names))))
    if word == "module":
        return _by_name(columns, lambda name: name.rpartition(".")[0] or name)
    if word == "lora":
        found = _by_name(columns, lambda name: next((part for part in name.split(".") if part in LORA), "other"))
        if found.names == ("other",):
            raise ValueError(
                f'backward: groups is "lora", expected a shared parameter that is in a module {" or ".join(LORA[:2])}'
            )
        return found
    raise ValueError(f"backward: groups is {word!r}, expected {FORMS}")


def _by_name(columns: Columns, group_of: Callable[[str], str]) -> Groups:
    """The parameters for which `group_of` returns the same are one group."""
    _check_named(columns)
    names = [group_of(name) for name in columns.names]
    for name, group in zip(columns.names, names, strict=True):
        if not isinstance(group, str):
            raise TypeError(f"backward: groups returned {group!r} for {name}, expected the name of its group")
    return Groups.by_name(names)


def _check_named(columns: Columns) -> None:
    """Raises unless the parameters came with the names that a module gives them."""
    expected = "expected shared to be a module or dict(module.named_parameters())"
    if any(FOUND.fullmatch(name) for name in columns.names):
        raise ValueError(
            "backward: groups needs the parameters' names, which are not known with features= or without shared=, "
            + expected
        )
    if any(POSITION.fullmatch(name) for name in columns.names):
        raise ValueError(f"backward: groups needs the parameters' names, {expected}")


def _members(given: object, group: object, columns: Columns) -> list[Tensor]:
    """The parameters of an entry of a dict: a name, a parameter, a module or several of them."""
    if isinstance(given, str):
        _check_named(columns)
        pairs = zip(*columns, strict=True)
        members = [p for name, p in pairs if name == given or name.startswith(f"{given}.")]
        if not members:
            raise ValueError(
                f"backward: groups has {given!r}, expected the name of a shared parameter or of its module"
            )
        return members
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, nn.Module):
        return list(given.parameters())
    if not isinstance(given, Iterable):
        raise TypeError(
            f"backward: groups[{group!r}] has a {type(given).__name__}, expected names, parameters or modules"
        )
    return [parameter for one in given for parameter in _members(one, group, columns)]


def _by_module(wanted: list[object], shared: Shared | None, columns: Columns) -> dict[str, list[Tensor]]:
    """The parameters of each module that is named, or that is an instance of a class and not within another one."""
    members: dict[str, list[Tensor]] = {}
    for one in wanted:
        if isinstance(one, str):
            members[one] = _members(one, one, columns)
        elif isinstance(one, type) and issubclass(one, nn.Module):
            within: set[nn.Module] = set()
            modules = _modules(shared)
            if not modules:
                raise ValueError(f"backward: groups has {one.__name__}, expected shared to be a module or several")
            found = [(name, module) for name, module in modules if isinstance(module, one)]
            for name, module in found:
                if module not in within:
                    members[name or type(module).__name__] = list(module.parameters())  # shared itself has no name
                    within |= set(module.modules())
            if not found:
                raise ValueError(f"backward: groups has {one.__name__}, expected the class of a module in shared")
        else:
            raise TypeError(
                f"backward: groups has a {type(one).__name__}, expected module names or classes, or a dict of modules"
            )
    return members


def _modules(shared: Shared | None) -> list[tuple[str, nn.Module]]:
    """All modules in what the user gave as shared, by name."""
    if isinstance(shared, nn.Module):
        return list(shared.named_modules())
    entries = shared if isinstance(shared, list | tuple) else []
    return [
        (f"{i}.{name}" if name else str(i), module)
        for i, entry in enumerate(entries)
        if isinstance(entry, nn.Module)
        for name, module in entry.named_modules()
    ]


def _partition(columns: Columns, members: Mapping[str, Sequence[Tensor]]) -> Groups:
    """The groups with these parameters, of which those that are not shared do not count."""
    group_of: dict[int, str] = {}
    names = {id(parameter): name for name, parameter in zip(*columns, strict=True)}
    sharded = sharded_parameters()
    for group, parameters in members.items():
        for parameter in parameters:
            if not isinstance(parameter, Tensor):
                raise TypeError(f"backward: groups[{group!r}] has a {type(parameter).__name__}, expected parameters")
            place = id(sharded.get(id(parameter), parameter))
            other = group_of.setdefault(place, group)
            if other != group and place in names:
                raise ValueError(f"backward: {names[place]} is in the groups {other!r} and {group!r}, expected one")
    for place, name in names.items():
        if place not in group_of:
            raise ValueError(f"backward: {name} is in none of the groups, expected each shared parameter in one")
    return Groups.by_name([group_of[id(parameter)] for parameter in columns.parameters])
