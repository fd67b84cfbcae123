"""Optimizer groups of the shared parameters and of each task's own."""

import pytest
import torch
from torch import nn

from mtlfast.training import parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.depth, self.normals = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 2)


def test_groups_and_their_settings():
    model = Model()
    groups = parameter_groups(
        model,
        shared=model.trunk,
        tasks={"depth": model.depth, "normals": model.normals},
        lr={"default": 0.1, "depth": 0.01},
        weight_decay={"shared": 0.5, "default": 0.0},
    )
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("shared", 0.1, 0.5),
        ("depth", 0.01, 0.0),
        ("normals", 0.1, 0.0),
    ]
    assert groups[1]["params"] == list(model.depth.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_and_a_schedule_for_each_task(optimizer):
    model = Model()
    groups = parameter_groups(model, shared=model.trunk, tasks=[model.depth, model.normals], lr=1.0)
    assert [group["name"] for group in groups] == ["shared", "task 0", "task 1"]
    assert "weight_decay" not in groups[0]
    optimizer = optimizer(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5**t, lambda t: float(t < 2)])
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        schedule.step()
    assert rates == [[1, 1, 1], [1, 0.5, 1], [1, 0.25, 0]]
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [True] * 4 + [False] * 2  # the last task's rate is 0


def test_frozen_parameters_are_left_out_and_others_are_the_rest():
    model = Model()
    model.trunk.bias.requires_grad_(False)
    groups = parameter_groups(model, shared=model.trunk.parameters(), tasks={"depth": [model.depth.weight]}, lr=0.1)
    assert [group["name"] for group in groups] == ["shared", "depth", "rest"]
    assert groups[0]["params"] == [model.trunk.weight]
    assert groups[2]["params"] == [model.depth.bias, *model.normals.parameters()]
    model.requires_grad_(False)
    assert [g["name"] for g in parameter_groups(model, shared=model.trunk, tasks=[], lr=0.1)] == ["shared"]


def test_bad_arguments():
    model = Model()

    def groups(**changes):
        given = {"shared": model.trunk, "tasks": {"depth": model.depth}, "lr": 0.1}
        return parameter_groups(model, **{**given, **changes})

    with pytest.raises(ValueError, match=r"parameter_groups: trunk.weight is in 'shared' and 'depth', expected"):
        groups(tasks={"depth": [model.depth.weight, model.trunk.weight]})
    with pytest.raises(ValueError, match=r"parameter_groups: a parameter of 'depth' is not the model's"):
        groups(tasks={"depth": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"parameter_groups: lr has 'heads', expected one of .*'depth', 'rest'"):
        groups(lr={"default": 0.1, "heads": 0.2})
    with pytest.raises(ValueError, match=r"parameter_groups: lr has no entry 'depth', expected that or 'default'"):
        groups(lr={"shared": 0.1})
