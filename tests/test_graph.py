"""The walk of the autograd graph: what losses reach, found natively and by the twin in Python."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtlfast import _native
from mtlfast.jacobian import _graph
from mtlfast.jacobian._graph import COMPILED, HIDING, _walk, reached_by


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


def two_outputs() -> list[Tensor]:
    a, b = nn.Linear(3, 6)(torch.ones(2, 3)).split(3, dim=1)
    return [a.sum(), b.sum() + nn.Linear(3, 1)(b).sum(), a.square().sum()]


GRAPHS = [
    tied,
    frozen_after_the_forward_pass,
    a_leaf_itself,
    a_custom_function,
    a_checkpoint,
    recurrent,
    deep,
    two_outputs,
]


@pytest.mark.native
@pytest.mark.parametrize("make", GRAPHS)
def test_both_walks_find_the_same(make):
    losses = make()
    leaves, by_several, _, functions = _native.C.reached_by(losses, [], False)
    expected, by_several_too, _, names = _walk(losses)
    assert len(leaves) == len({id(leaf) for leaf in leaves})
    found = {id(leaf): several for leaf, several in zip(leaves, by_several, strict=True)}
    assert found == {id(leaf): several for leaf, several in zip(expected, by_several_too, strict=True)}
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    assert set(functions) <= names
    assert set(functions) & set(HIDING) == names & set(HIDING)


WALKS = [_walk, pytest.param(lambda *given: _native.C.reached_by(*given), marks=pytest.mark.native)]


def by_brute_force(losses: list[Tensor]) -> dict[int, bool]:
    """For each leaf whether several losses reach it, by a walk for each loss."""
    reached = [{id(leaf) for leaf in _walk([loss])[0]} for loss in losses]
    return {leaf: sum(leaf in one for one in reached) > 1 for leaf in set().union(*reached)}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("make", GRAPHS)
def test_which_leaves_several_losses_reach(walk, make):
    losses = make()
    leaves, by_several, *_ = walk(losses, [], False)
    assert dict(zip(map(id, leaves), by_several, strict=True)) == by_brute_force(losses)


@pytest.mark.parametrize("walk", WALKS)
def test_which_leaves_several_losses_reach_in_random_graphs(walk):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        leaves = [torch.ones((), requires_grad=True) for _ in range(6)]
        values = list(leaves)
        for _ in range(20):
            i, j = torch.randint(len(values), (2,), generator=generator).tolist()
            values.append(values[i] * values[j] if i != j else values[i].exp())
        losses = [values[i] for i in torch.randint(len(values), (4,), generator=generator).tolist()]
        found, by_several, *_ = walk(losses, [], False)
        assert dict(zip(map(id, found), by_several, strict=True)) == by_brute_force(losses)


@pytest.mark.parametrize("walk", WALKS)
def test_a_loss_given_twice_counts_as_two(walk):
    layer = nn.Linear(3, 1)
    loss = layer(torch.ones(2, 3)).sum()
    assert walk([loss, loss], [], False)[1] == [True, True]
    assert walk([loss], [], False)[1] == [False, False]


@pytest.mark.parametrize("walk", WALKS)
def test_the_walk_stops_at_one_output_of_a_node_and_goes_through_another(walk):
    layer, head = nn.Linear(3, 6), nn.Linear(3, 1)
    a, b = layer(torch.ones(2, 3)).split(3, dim=1)
    leaves, _, met, _ = walk([head(a).sum()], [a], False)
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in head.parameters()}
    assert met == [True]
    leaves, _, met, _ = walk([head(b).sum()], [a], False)
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in [*head.parameters(), *layer.parameters()]}
    assert met == [False]


@pytest.mark.parametrize("walk", WALKS)
def test_behind_features_one_that_another_is_computed_from_is_met(walk):
    layer = nn.Linear(3, 3)
    low = layer(torch.ones(2, 3))
    high, leaf = low.tanh(), torch.ones(3, requires_grad=True)
    assert walk([high, low, leaf], [high, low, leaf], True)[2] == [False, True, False]
    leaves, _, met, _ = walk([low, leaf], [low, leaf], True)
    assert met == [False, False]
    assert {id(x) for x in leaves} == {id(x) for x in [*layer.parameters(), leaf]}


def test_no_node_is_visited_more_than_twice(monkeypatch):
    visits = []

    class Node:
        def __init__(self, *behind):
            self.behind = [(node, 0) for node in behind]

        @property
        def next_functions(self):
            visits.append(self)
            return self.behind

    trunk = Node()
    for _ in range(50):
        trunk = Node(trunk, trunk)
    losses = [Node(trunk) for _ in range(1000)]
    monkeypatch.setattr(_graph, "_edge", lambda node: (node, 0))
    _walk(losses)
    assert max(visits.count(node) for node in {visit for visit in visits if visit not in losses}) == 2
    assert len(visits) == 1000 + 2 * 51


def test_a_compiled_backward_pass_that_overwrites_what_it_reads_is_refused(monkeypatch):
    class Function:
        metadata = SimpleNamespace(bw_donated_idxs=[0])
        compiled_bw = print

    class CompiledFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx._forward_cls = Function
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    parameter = torch.ones(2, requires_grad=True)
    reached = reached_by([CompiledFunction.apply(parameter).sum()])
    assert COMPILED in reached.functions
    reached.check("backward", several_passes=False)
    with pytest.raises(ValueError, match="donated_buffer = False"):
        reached.check("backward", several_passes=True)
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", False)
    reached.check("backward", several_passes=True)


def test_what_hides_parameters_is_said():
    assert "use_reentrant=True" in (reached_by(a_checkpoint()).hiding or "")
    assert reached_by(tied()).hiding is None
