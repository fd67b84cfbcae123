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


@pytest.mark.parametrize("groups", [None, "tensor"])
@pytest.mark.parametrize("mixing", ["dense", "disjoint"])
@pytest.mark.parametrize("name", ["MLP", "transformer, batch first, causal", "conv 2d", "tied head"])
def test_a_budget_takes_more_passes_for_the_same_step(name, mixing, groups):
    net, A = model(name), MIXINGS[mixing]()
    stored, expected = step(net, A, "stored", UPGrad(), groups=groups)
    within, got = step(net, A, "mixing", UPGrad(), groups=groups, memory_budget=2000)
    assert "backward passes" in within.plan.reason
    lengths = stored.norms
    torch.testing.assert_close(within.norms, lengths, rtol=1e-11, atol=1e-11 * float(lengths.max()))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_large_budget_takes_one_pass():
    net, A = model("MLP"), MIXINGS["dense"]()
    result, _ = step(net, A, "mixing", UPGrad(), memory_budget=10**9)
    assert "1 backward pass for" in result.plan.reason


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
