"""`at=features`: what happens in the one backward pass below the features, and steps that fail there."""

import pytest
import torch
from elementwise import METHODS as ELEMENTWISE
from passes import Breaks, Counted
from test_at_features import Net, assert_close
from torch import nn

import mtlfast
from mtlfast.aggregation import CRMOGM, PCGrad, Sum, UPGrad
from mtlfast.weighting import Constant


def test_a_table_without_grad_updates_itself_in_the_backward_pass():
    table, calls = torch.zeros(9, 5, dtype=torch.float64), []

    class Lookup(torch.autograd.Function):
        """A table that is no parameter, whose rows move in the backward pass."""

        @staticmethod
        def forward(ctx, ids, anchor):
            ctx.ids = ids
            return table[ids] + 0 * anchor

        @staticmethod
        def backward(ctx, g):
            calls.append(1)
            table.index_add_(0, ctx.ids, g, alpha=-1.0)
            return None, None

    net, ids = Net(), torch.tensor([1, 1, 4])
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    features = Lookup.apply(ids, anchor)
    losses = net.losses(features)
    wanted = torch.autograd.grad(losses[0] + losses[1] + losses[2], features, retain_graph=True)[0]
    mtlfast.backward(losses, Sum(), at=features)
    assert calls == [1]
    assert torch.allclose(table, torch.zeros_like(table).index_add_(0, ids, -wanted))


def test_an_optimizer_in_backward_frees_each_grad():
    net, twin, freed = Net(), Net(), []

    def update(p):
        p.add_(p.grad, alpha=-0.1)
        p.grad = None
        freed.append(p)

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(update)
    net.step(UPGrad())
    twin.step(UPGrad())
    assert len(freed) == len(set(freed)) == len(list(net.parameters()))
    assert all(p.grad is None for p in net.parameters())
    assert_close(net.parameters(), [p - 0.1 * p.grad for p in twin.parameters()])


@pytest.mark.parametrize("method", ["UPGrad", "Median"])
@pytest.mark.parametrize("before", ["none", "dense", "sparse"])
def test_a_failing_trunk_leaves_every_grad(before, method):
    torch.manual_seed(0)
    table, layer = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 5)
    heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
    parameters = [*table.parameters(), *layer.parameters(), *heads.parameters()]
    if before != "none":
        for p in parameters:
            p.grad = torch.ones_like(p)
    if before == "sparse":
        table.weight.grad = torch.sparse_coo_tensor([[2, 3]], torch.ones(2, 4), (9, 4), check_invariants=True)
    kept = [(p.grad, None if p.grad is None else p.grad.clone()) for p in parameters]
    features = layer(table(torch.tensor([1, 1, 5])))
    aggregator = {"UPGrad": UPGrad, "Median": ELEMENTWISE["Median"].make}[method]()
    broken = Breaks.apply(torch.ones((), requires_grad=True))  # beside the rest, so that some of the trunk went through
    features = features * broken
    with pytest.raises(RuntimeError, match="planted"):
        mtlfast.backward([head(features).square().mean() for head in heads], aggregator, at=features)
    for p, (grad, values) in zip(parameters, kept, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad.to_dense(), values.to_dense())


def test_a_failing_trunk_leaves_the_state_of_the_method():
    net = Net()
    aggregator = CRMOGM(UPGrad())
    net.step(aggregator)
    state = {name: value.clone() for name, value in aggregator.state_dict().items()}
    features = Breaks.apply(net.trunk(3 * net.x))  # other gradients, so that the weights would move
    with pytest.raises(RuntimeError, match="planted"):
        mtlfast.backward(net.losses(features), aggregator, at=features)
    assert all(torch.equal(value, state[name]) for name, value in aggregator.state_dict().items())


@pytest.mark.parametrize("where", ["trunk", "heads"])
def test_a_failing_post_accumulate_hook(where):
    # Below the features it stops the step, elsewhere it comes after it.
    def fails(p):
        raise RuntimeError("planted")

    net, aggregator = Net(), CRMOGM(UPGrad())
    net.step(aggregator)
    before = [p.grad.clone() for p in net.parameters()]
    state = {name: value.clone() for name, value in aggregator.state_dict().items()}
    net.x = 3 * net.x  # other gradients, so that the weights would move
    getattr(net, where)[0].weight.register_post_accumulate_grad_hook(fails)
    with pytest.raises(RuntimeError, match="planted"):
        net.step(aggregator)
    moved = {not torch.equal(p.grad, values) for p, values in zip(net.parameters(), before, strict=True)}
    assert moved == {where == "heads"}
    if where == "trunk":
        assert all(torch.equal(value, state[name]) for name, value in aggregator.state_dict().items())


def test_a_grad_that_cannot_be_added_to_is_refused_before_the_last_pass():
    net = Net()
    net.trunk[2].bias.grad = torch.ones(1, dtype=torch.float64).expand(5)
    Counted.passes = 0
    features = Counted.apply(net.trunk(net.x))
    with pytest.raises(RuntimeError, match=r"the \.grad of a parameter of shape \[5\] is an expanded tensor"):
        mtlfast.backward(net.losses(features), UPGrad(), at=features)
    assert Counted.passes == 0
    assert sum(p.grad is not None for p in net.parameters()) == 1


def test_sparse_gradients_of_features():
    # The table's rows are looked up behind an operation, so that the features' gradients are sparse.
    grads = []
    for run in (lambda ls, f: mtlfast.backward(ls, Sum(), at=f), lambda ls, f: sum(ls).backward()):
        w = nn.Parameter(torch.ones(9, 4))
        table = 2 * w
        lookups = [nn.functional.embedding(torch.tensor(ids), table, sparse=True) for ids in ([1, 1, 3], [1, 2])]
        run([lookup.square().sum() for lookup in lookups], table)
        grads.append(w.grad.to_dense())
    assert torch.equal(*grads)


def test_complex_features_are_refused_before_any_pass():
    net = Net(2)
    net.heads[0].weight.register_hook(lambda g: pytest.fail("a backward pass ran"))
    spectrum = torch.fft.fft(net.trunk(net.x))
    with pytest.raises(TypeError, match=r"backward: at has dtype torch\.complex128, expected float32"):
        mtlfast.backward(net.losses(spectrum.abs()), UPGrad(), at=spectrum)


def test_tasks_that_do_not_reach_the_features_or_have_no_weight():
    net = Net(3)
    features = net.trunk(net.x)
    beside = net.heads[1](torch.ones(2, 5, dtype=torch.float64)).square().mean()
    first, _, third = net.losses(features)
    result = mtlfast.backward([first, beside, third], PCGrad(), at=features, weighting=Constant([1.0, 1.0, 0.0]))
    assert result.weights.tolist() == [1, 0, 0]
    assert net.heads[1].weight.grad is not None
    net.zero_grad()
    features = net.trunk(net.x)
    losses = [net.losses(features)[0], net.heads[1](torch.ones(2, 5, dtype=torch.float64)).square().mean()]
    result = mtlfast.backward(losses, PCGrad(), at=features, weighting=Constant([0.0, 1.0]))
    assert result.weights.tolist() == [0, 0]
    assert all(p.grad is None for p in net.trunk.parameters())
