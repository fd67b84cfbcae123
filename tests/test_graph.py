"""The walk of the autograd graph: what losses reach, found natively and by the twin in Python."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtlfast import _native
from mtlfast.jacobian._graph import HIDING, _walk, reached_by


class Twice(torch.autograd.Function):
    """A function with attributes of its own that look like a leaf's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.variable = torch.zeros(2, requires_grad=True)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


def tied() -> list[Tensor]:
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    return [layer(layer(x)).sum(), layer(x).sum()]


def frozen_after_the_forward_pass() -> list[Tensor]:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    loss = net(torch.ones(2, 3)).sum()
    net[0].requires_grad_(False)
    return [loss]


def a_leaf_itself() -> list[Tensor]:
    leaf = torch.ones((), requires_grad=True)
    return [leaf, 3 * leaf]


def a_custom_function() -> list[Tensor]:
    return [Twice.apply(nn.Linear(3, 1)(torch.ones(2, 3))).sum()]


def a_checkpoint() -> list[Tensor]:
    x = torch.ones(2, 3, requires_grad=True)
    return [checkpoint(nn.Linear(3, 1), x, use_reentrant=True).sum()]


def recurrent() -> list[Tensor]:
    output, _ = nn.LSTM(3, 4, num_layers=2)(torch.ones(5, 2, 3))
    return [output.sum(), output[-1].square().sum()]


def deep() -> list[Tensor]:
    x = torch.ones(2, requires_grad=True)
    total = x
    for _ in range(20_000):
        total = total + x
    return [total.sum()]


@pytest.mark.native
@pytest.mark.parametrize(
    "make", [tied, frozen_after_the_forward_pass, a_leaf_itself, a_custom_function, a_checkpoint, recurrent, deep]
)
def test_both_walks_find_the_same(make):
    losses = make()
    leaves, functions = _native.C.reached_by(losses)
    expected, names = _walk(losses)
    assert len(leaves) == len({id(leaf) for leaf in leaves})
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in expected}
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    assert set(functions) <= names
    assert set(functions) & set(HIDING) == names & set(HIDING)


def test_what_hides_parameters_is_said():
    assert "use_reentrant=True" in (reached_by(a_checkpoint()).hiding or "")
    assert reached_by(tied()).hiding is None
