"""Mixtures of samples within a memory budget, and graphs that move rows by indices."""

import pytest
import torch
from mixing_models import MIXINGS, model
from torch import nn

import mtlfast
from mtlfast.aggregation import Constant, UPGrad

pytestmark = pytest.mark.native


def step(net: nn.Module, A: torch.Tensor, way: str, aggregator, **options):
    net.zero_grad()
    result = mtlfast.backward(
        net.losses(), aggregator, shared=net.trunk, mixing=A, jacobian=way, diagnostics=True, **options
    )
    return result, [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def largest_layer(net: nn.Module, A: torch.Tensor) -> int:
    """The bytes that the rows of the largest layer take, so that not all layers fit beside each other."""
    sizes = [layer.memory for layer in step(net, A, "mixing", UPGrad())[0].plan.layers]
    assert max(sizes) < sum(sizes)
    return max(sizes)


@pytest.mark.parametrize("groups", [None, "tensor"])
@pytest.mark.parametrize("mixing", ["dense", "disjoint"])
@pytest.mark.parametrize("name", ["MLP", "transformer, batch first, causal", "conv 2d", "tied head"])
def test_a_budget_takes_more_passes_for_the_same_step(name, mixing, groups):
    net, A = model(name), MIXINGS[mixing]()
    stored, expected = step(net, A, "stored", UPGrad(), groups=groups)
    within, got = step(net, A, "mixing", UPGrad(), groups=groups, memory_budget=largest_layer(net, A))
    assert "backward passes" in within.plan.reason
    lengths = stored.norms
    torch.testing.assert_close(within.norms, lengths, rtol=1e-11, atol=1e-11 * float(lengths.max()))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_large_budget_takes_one_pass():
    net, A = model("MLP"), MIXINGS["dense"]()
    result, _ = step(net, A, "mixing", UPGrad(), memory_budget=10**9)
    assert "1 backward pass for" in result.plan.reason


@pytest.mark.parametrize("name", ["MLP", "conv 2d", "tied head"])
def test_a_budget_below_one_layer_is_refused(name):
    net, A = model(name), MIXINGS["dense"]()
    most = largest_layer(net, A)
    net.zero_grad()
    expected = f"memory_budget is {most - 1} bytes, expected at least {most}, which one layer takes"
    with pytest.raises(ValueError, match=f'^backward: jacobian is "mixing", but {expected}$'):
        step(net, A, "mixing", UPGrad(), memory_budget=most - 1)
    assert all(p.grad is None for p in net.parameters())


def test_a_budget_below_one_layer_takes_a_pass_for_each_task():
    torch.manual_seed(0)
    x, A = torch.randn(4, 200, 2, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    net = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.Linear(2, 1)}).double()
    net.losses = lambda: net["head"](net["trunk"](x).tanh()).square().mean((1, 2))
    net.trunk = net["trunk"]
    whole, expected = step(net, A, "auto", UPGrad())
    assert whole.plan.way == "mixing"
    most, stored = largest_layer(net, A), sum(8 * len(A) * p.numel() for p in net.trunk.parameters())
    assert stored < most
    within, got = step(net, A, "auto", UPGrad(), memory_budget=stored)
    assert within.plan.way == "stored"
    assert f"not mixed, because memory_budget is {stored} bytes, expected at least {most}" in within.plan.reason
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_rows_that_an_index_moves_are_probed_at_each_step():
    torch.manual_seed(0)
    layer, head, x = nn.Linear(6, 6).double(), nn.Linear(6, 1).double(), torch.randn(8, 6, dtype=torch.float64)
    weights = Constant([1.0, 2.0])
    for order in (torch.arange(8), torch.randperm(8), torch.randperm(8)):
        found = []
        for way in ("stored", "auto"):
            layer.zero_grad()
            losses = head(torch.tanh(layer(x))[order]).square().sum(1)
            result = mtlfast.backward(
                losses, weights, shared=layer, mixing=torch.arange(8) % 2, jacobian=way, diagnostics=True
            )
            found.append((result.gram, layer.weight.grad.clone()))
        torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_a_budget_below_k_gradients_takes_one_pass_that_takes_more_flops():
    net, A = model("MLP over tokens"), torch.randn(2, 5, dtype=torch.float64)
    assert step(net, A, "auto", UPGrad())[0].plan.way != "mixing"
    budget = largest_layer(net, A)
    expected = step(net, A, "stored", UPGrad())[1]
    within, got = step(net, A, "auto", UPGrad(), memory_budget=budget)
    assert within.plan.way == "mixing"
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    net.zero_grad()
    with pytest.raises(ValueError, match=r"memory_budget is 1 bytes, .*; not mixed, because memory_budget is 1 bytes"):
        step(net, A, "auto", UPGrad(), memory_budget=1)
    assert all(p.grad is None for p in net.parameters())
