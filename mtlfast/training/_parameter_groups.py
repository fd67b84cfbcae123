"""Optimizer groups for the shared parameters and each task's own."""

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
    """Builds groups with learning rates and weight decays of their own, for any torch optimizer.

    The groups are "shared", then the tasks, then "rest", if the model has parameters that are in none of them. LR
    schedulers that take one function a group (`LambdaLR`, `MultiplicativeLR`) then give each task its own schedule.

    Args:
        model: whose parameters they all are; frozen ones are left out.
        shared: the trunk, a module or its parameters.
        tasks: each task's own, by name; or a sequence, whose names are "task 0", "task 1", ...
        lr: for all groups, or by name; "default" is for those not named.
        weight_decay: the same; None: the optimizer's.

    Returns:
        A list of groups `{"params": [...], "name": ..., "lr": ...}`, with `weight_decay` where it was given.

    Raises:
        ValueError: a parameter is in two groups or not the model's, a name has no group, a group no learning rate.

    Example:
        `torch.optim.AdamW(parameter_groups(model, shared=model.trunk, tasks={"depth": model.depth},
        lr={"default": 1e-3, "depth": 1e-4}))`
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
        raise ValueError(f"parameter_groups: {what} has nothing for {name!r}, expected it or 'default'")
    return given[name] if name in given else given["default"]
