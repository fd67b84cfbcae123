"""Which way `mtlfast.backward` takes where `jacobian` is not given."""

import pytest
import torch
from implicit_steps import Tasks
from torch import nn

import mtlfast
from mtlfast.aggregation import GradDrop, PCGrad, Sum, UPGrad
from mtlfast.jacobian import _plan

pytestmark = pytest.mark.native

WIDTH, K = 512, 4
assert K * WIDTH**2 >= _plan.SMALL


def large(width: int = WIDTH) -> Tasks:
    return Tasks(nn.Sequential(nn.Linear(width, width), nn.Tanh()), width, K)


def step(model: Tasks, aggregator=None, **options) -> tuple[mtlfast.StepResult, list[torch.Tensor | None]]:
    model.zero_grad()
    x = torch.ones(2, next(model.trunk.parameters()).shape[1], device=next(model.parameters()).device)
    made = mtlfast.backward(model.losses(x), aggregator or UPGrad(), shared=model.trunk, **options)
    return made, [p.grad for p in model.parameters()]


def test_a_large_model_on_a_cpu_takes_the_implicit_way_where_that_saves_flops():
    model = large()
    by_default, got = step(model)
    assert by_default.plan.way == "implicit"
    assert by_default.plan == step(model, jacobian="auto")[0].plan
    stored, expected = step(model, jacobian="stored")
    assert stored.plan.way == "stored"
    torch.testing.assert_close(by_default.weights, stored.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [None, "auto"])
def test_a_small_model_is_stored_without_a_walk(way, monkeypatch):
    model = large(WIDTH // 2)
    monkeypatch.setattr("mtlfast.jacobian._implicit.walk", lambda losses: pytest.fail("it walked"))
    plan = step(model, jacobian=way)[0].plan
    assert str(plan) == "stored: the tasks' gradients have 263,168 elements, and a plan is made from 1,048,576 on"


def test_a_budget_has_a_small_model_walked():
    plan = step(large(64), memory_budget=10**6)[0].plan
    assert plan.way == "implicit"


def test_rows_that_save_nothing_and_methods_that_need_gradients_are_stored():
    model = large()
    x = torch.ones(WIDTH, WIDTH)
    plan = mtlfast.backward(model.losses(x), PCGrad(), shared=model.trunk).plan
    assert plan.way == "stored"
    assert plan.layers
    assert str(step(model, GradDrop())[0].plan) == "stored: GradDrop needs the task gradients themselves"


def test_a_storage_dtype_stores():
    made = step(large(), PCGrad(order="fixed"), storage_dtype=torch.bfloat16)[0]
    assert (made.plan.way, made.plan.reason) == ("stored", "")


def test_another_device_stores_until_it_is_measured():
    with torch.device("meta"):
        model = large()
    plan = step(model, Sum())[0].plan
    assert (plan.way, plan.reason) == ("stored", "")
