"""When the implicit way runs one backward pass through the trunk for all tasks, and that it is as exact."""

import pytest
import torch
from torch import nn

import mtlfast
from mtlfast.aggregation import Constant

WEIGHTS = [1.0, 2.0, -0.5]


class Trunk(nn.Module):
    """A normalisation and two linear layers, whose results are all there for the losses."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.double()

    def forward(self, x):
        low = self.norm(x)
        return low, self.second(torch.tanh(self.first(low)))


# Of the trunk's low and high results: three losses, and how the passes must run.
LOSSES = {
    "all above": (lambda low, high: [high.square().sum(), high.sin().sum(), high.exp().sum()], "batched"),
    "one of the low result alone": (
        lambda low, high: [high.square().sum(), high.sin().sum(), low.cos().sum()],
        "sequential",
    ),
    "one of both results": (
        lambda low, high: [high.square().sum(), high.sin().sum() + low.square().sum(), high.exp().sum()],
        "sequential",
    ),
    "one tensor for all": (lambda low, high: list(high.square().sum(0)[:3]), "batched"),
    "the same loss twice": (lambda low, high: [high.square().sum()] * 2 + [high.sin().sum()], "batched"),
}


@pytest.mark.native
@pytest.mark.parametrize("name", LOSSES)
def test_the_passes_are_batched_only_where_all_gradients_go_through_one_tensor(name):
    torch.manual_seed(0)
    losses, sweep = LOSSES[name]
    trunk, x = Trunk(), torch.randn(4, 16, dtype=torch.float64)
    found = {}
    for way in ("stored", "implicit"):
        trunk.zero_grad()
        step = mtlfast.backward(losses(*trunk(x)), Constant(WEIGHTS), shared=trunk, jacobian=way, diagnostics=True)
        found[way] = step, [parameter.grad.clone() for parameter in trunk.parameters()]
    (stored, expected), (implicit, got) = found["stored"], found["implicit"]
    assert implicit.plan.sweep == sweep, implicit.plan
    assert {layer.name for layer in implicit.plan.layers if layer.way == "implicit"} == {
        "first.weight",
        "second.weight",
    }
    torch.testing.assert_close(implicit.gram, stored.gram, rtol=1e-12, atol=1e-12 * float(stored.gram.diagonal().max()))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.native
@pytest.mark.parametrize("mixing", [False, True])
def test_a_hook_of_a_parameter_sees_the_gradient_of_each_task(mixing):
    torch.manual_seed(0)
    trunk, x = Trunk(), torch.randn(4, 16, dtype=torch.float64)
    shared = [*trunk.first.parameters(), *trunk.second.parameters()]
    found = {}
    for way in ("stored", "auto" if mixing else "implicit"):
        trunk.zero_grad()
        calls = []
        handle = trunk.norm.bias.register_hook(
            lambda gradient, calls=calls: calls.append(1) or gradient.clamp(max=0.01)
        )
        _, high = trunk(x)
        losses = high.square().sum(1) if mixing else [high.square().sum(), high.sin().sum(), high.exp().sum()]
        given = {"mixing": torch.rand(3, 4, generator=torch.Generator().manual_seed(0))} if mixing else {}
        step = mtlfast.backward(losses, Constant(WEIGHTS), shared=shared, jacobian=way, diagnostics=True, **given)
        handle.remove()
        found[way] = step.gram, trunk.norm.bias.grad
        assert len(calls) == 3
    torch.testing.assert_close(*found.values(), rtol=1e-12, atol=1e-12)
