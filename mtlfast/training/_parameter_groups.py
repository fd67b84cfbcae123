"""`parameter_groups`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Parameters = nn.Module | Iterable[Tensor]
ByGroup = float | Mapping[str, float]


def parameter_groups(
    model: nn.Module,
    *,
    shared: Parameters,
    tasks: Mapping[str, Parameters] | Sequence[Parameters],
    lr: ByGroup,
    weight_decay: ByGroup | None = None,
) -> list[dict[str, Any]]:
    """Makes optimizer groups of the shared parameters and of each task's own, with learning rates of their own.

    The groups are "shared", then one for each task, then "rest" if the model has other parameters. Schedulers that take
    one function for each group (`LambdaLR`, `MultiplicativeLR`) can then give each task a schedule of its own.

    Args:
        model: the module that has all the parameters. Frozen parameters are left out.
        shared: the parameters that the tasks share, as a module or a list of parameters.
        tasks: each task's own parameters, in a dict by the task's name or in a sequence, whose tasks are named "task
            0", "task 1" and so on.
        lr: one learning rate for all groups, or a dict by the group's name, where "default" is for all other groups.
        weight_decay: the weight decay, in the same forms. None: the optimizer's default.

    Returns:
        A list of groups `{"params": [...], "name": ..., "lr": ...}` for any torch optimizer, with "weight_decay" if it
        was given.

    Raises:
        ValueError: a parameter is in two groups or is not the model's, a name in `lr` or `weight_decay` has no group,
            or a group has no learning rate.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mtlfast.training import parameter_groups
        >>> model = nn.ModuleDict({"trunk": nn.Linear(4, 3), "depth": nn.Linear(3, 1), "normals": nn.Linear(3, 3)})
        >>> groups = parameter_groups(
        ...     model,
        ...     shared=model["trunk"],
        ...     tasks={"depth": model["depth"], "normals": model["normals"]},
        ...     lr={"default": 1e-3, "depth": 1e-4},
        ... )
        >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
        [('shared', 0.001, 2), ('depth', 0.0001, 2), ('normals', 0.001, 2)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    named = tasks if isinstance(tasks, Mapping) else {f"task {k}": of_task for k, of_task in enumerate(tasks)}
    every = {"shared": shared, **named}
    members = {name: _parameters(of_group) for name, of_group in every.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owner: dict[int, str] = {}
    for group, parameters in members.items():
        for parameter in parameters:
            if id(parameter) not in names:
                raise ValueError(f"parameter_groups: a parameter of {group!r} is not the model's, expected one that is")
            if (other := owner.setdefault(id(parameter), group)) != group:
                raise ValueError(
                    f"parameter_groups: {names[id(parameter)]} is in {other!r} and {group!r}, expected one group"
                )
    rest: list[Tensor] = [parameter for parameter in model.parameters() if id(parameter) not in owner]
    if any(parameter.requires_grad for parameter in rest):
        members["rest"] = rest
    groups = []
    for name, parameters in members.items():
        settings: dict[str, Any] = {"params": [p for p in parameters if p.requires_grad], "name": name}
        settings["lr"] = _setting("lr", lr, name, members)
        if weight_decay is not None:
            settings["weight_decay"] = _setting("weight_decay", weight_decay, name, members)
        groups.append(settings)
    return groups


def _parameters(given: Parameters) -> list[Tensor]:
    return list(dict.fromkeys(given.parameters() if isinstance(given, nn.Module) else given))


def _setting(what: str, given: ByGroup, name: str, groups: Mapping[str, object]) -> float:
    if not isinstance(given, Mapping):
        return given
    for key in given:
        if key not in groups and key != "default":
            raise ValueError(f"parameter_groups: {what} has {key!r}, expected one of {[*groups, 'default']}")
    if name not in given and "default" not in given:
        raise ValueError(f"parameter_groups: {what} has no entry {name!r}, expected that or 'default'")
    return given[name] if name in given else given["default"]
