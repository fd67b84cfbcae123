"""Mixtures of samples where parts of parameters are used, beside the stored way."""

import pytest
import torch
from mixing_models import MIXINGS, D, Model, assert_as_stored, assert_same_grads, rows, step
from mixing_parts import PARTS
from torch import nn

import mtlfast
from mtlfast.aggregation import UPGrad
from mtlfast.jacobian import _sample_products, _sample_uses

pytestmark = pytest.mark.native


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = PARTS[name]().to(dtype)
    assert isinstance(net, Model)
    net.given = net.given.to(dtype)
    return net


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", PARTS)
def test_the_gram_matrix_and_the_update_are_those_of_the_stored_way(name, mixing):
    assert_as_stored(made(name), MIXINGS[mixing]())


@pytest.mark.parametrize("name", PARTS)
def test_a_whole_method_with_groups(name):
    assert_as_stored(made(name), MIXINGS["dense"](), 1e-11, UPGrad, groups="tensor")


@pytest.mark.parametrize("name", PARTS)
def test_samples_gradients_in_place_of_pairs_of_rows(name, monkeypatch):
    def takes(uses) -> bool:
        return all(use.left is not None and use.left.is_floating_point() for use in uses)

    monkeypatch.setattr(_sample_products, "takes_samples", takes)
    assert_as_stored(made(name), MIXINGS["dense"]())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PARTS)
def test_float32(name):
    assert_as_stored(made(name, torch.float32), MIXINGS["dense"](), 5e-6)


@pytest.mark.parametrize("name", PARTS)
def test_a_budget_and_the_check(name, monkeypatch):
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    net, A = made(name), MIXINGS["dense"]()
    stored = step(net, A, UPGrad(), "stored")
    budget = max(layer.memory for layer in step(net, A, UPGrad(), "mixing").step.plan.layers)
    within = step(net, A, UPGrad(), "mixing", memory_budget=budget)
    assert_same_grads(within.grads, stored.grads, 1e-11, float(stored.step.norms.max()))


class Sliced(nn.Module):
    """A matrix of which two blocks of rows are used, which may have rows in common."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.start = nn.Parameter(torch.randn(2 * D, D)), D

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight[:D]) @ self.weight[self.start : self.start + D]


def test_a_plan_is_not_kept_for_other_parts():
    torch.manual_seed(0)
    net = Model(Sliced(), rows(D)).double()
    net.given, A = net.given.double(), MIXINGS["dense"]()
    shared = dict(net.trunk.named_parameters())
    plans = []
    for start in (D, D - 1, D):
        net.trunk.start = start
        plans.append(mtlfast.backward(net.losses(), UPGrad(), shared=shared, mixing=A).plan)
    assert [plan.way == "mixing" for plan in plans] == [True, False, True]
    assert "elements in common" in plans[1].reason


@pytest.mark.parametrize("name", ["attention to two memories", "slices as matrices"])
def test_parts_that_are_taken_for_one_are_noticed(name, monkeypatch):
    net = made(name)
    monkeypatch.setattr(_sample_uses.SampleUse, "part_key", 0)
    with pytest.raises(AssertionError):
        assert_as_stored(net, MIXINGS["dense"]())
    monkeypatch.setenv("MTLFAST_CHECK", "1")
    with pytest.raises(RuntimeError, match="MTLFAST_CHECK found"):
        step(net, MIXINGS["dense"](), UPGrad(), "mixing")
