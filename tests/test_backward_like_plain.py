"""`mtlfast.backward` works wherever plain `backward()` works, and with `Sum` it leaves the same gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import Aggregator, PCGrad, Sum

AGGREGATORS = {"Sum": Sum, "PCGrad": lambda: PCGrad(order="fixed")}


class Net(nn.Module):
    """Two layers as a trunk, two heads, and an embedding of a task's own."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
        self.own = nn.Embedding(10, 3, sparse=sparse)

    def losses(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        index = torch.arange(len(x)) % 4
        return [self.heads[0](features).square().mean(), (self.heads[1](features * self.own(index))).square().mean()]


def grads(net: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else (p.grad.to_dense() if p.grad.is_sparse else p.grad).clone()
        for name, p in net.named_parameters()
    }


def assert_like_plain(net: Net, plain: Net) -> None:
    mine, theirs = grads(net), grads(plain)
    for name in mine:
        assert (mine[name] is None) == (theirs[name] is None), name
        if mine[name] is not None:
            assert mine[name].dtype == theirs[name].dtype, name
            assert torch.allclose(mine[name].float(), theirs[name].float(), atol=1e-6), name
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is None or p.grad.layout == q.grad.layout, name


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 4)


@pytest.mark.parametrize("frozen", ["trunk.0.weight", "trunk.2.bias", "heads.0.weight", "heads.1", "own.weight"])
def test_what_is_frozen_after_the_forward_pass_is_left_alone(frozen, x):
    net = Net()
    plain = copy.deepcopy(net)
    losses, wanted = net.losses(x), plain.losses(x)
    for which in (net, plain):
        which.get_parameter(frozen).requires_grad_(False) if "weight" in frozen or "bias" in frozen else (
            which.get_submodule(frozen).requires_grad_(False)
        )
    sum(wanted).backward()
    mtlfast.backward(losses, Sum(), shared=net.trunk.parameters())
    assert_like_plain(net, plain)


@pytest.mark.parametrize("first", ["none", "sparse", "dense"])
def test_a_sparse_gradient_outside_of_the_shared_parameters(first, x):
    net = Net(sparse=True)
    plain = copy.deepcopy(net)
    for which in (net, plain):
        if first == "dense":
            which.own.weight.grad = torch.ones(10, 3)
        if first == "sparse":
            sum(which.losses(x)).backward()
    sum(plain.losses(x)).backward()
    mtlfast.backward(net.losses(x), Sum(), shared=net.trunk.parameters())
    assert_like_plain(net, plain)


def test_a_leaf_with_a_sparse_and_a_dense_gradient(x):
    # Two tasks reach one embedding: one looks up rows, the other uses its whole weight, in both orders.
    for order in (1, -1):
        net = Net(sparse=True)
        features = net.trunk(x)
        losses = [net.own(torch.tensor([1, 2])).sum() + features.sum(), net.own.weight.square().sum() * features.sum()]
        wanted = torch.autograd.grad(losses[1], net.own.weight, retain_graph=True)[0].clone()
        wanted[1:3] += 1
        mtlfast.backward(losses[::order], Sum(), shared=net.trunk.parameters())
        assert torch.allclose(net.own.weight.grad.to_dense(), wanted)


def test_a_sparse_gradient_of_a_shared_parameter(x):
    trunk = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2))
    plain = copy.deepcopy(trunk)
    for net, step in ((plain, lambda losses: sum(losses).backward()), (trunk, None)):
        losses = [net(torch.tensor([1, 2])).mean(), net(torch.tensor([3])).square().mean()]
        mtlfast.backward(losses, Sum(), shared=net) if step is None else step(losses)
    assert trunk[0].weight.grad.is_sparse
    assert_like_plain(trunk, plain)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("steps", [1, 2])
def test_shared_parameters_of_two_dtypes(aggregator, steps, x):
    trunk, norm, heads = nn.Linear(4, 5).bfloat16(), nn.LayerNorm(5), nn.ModuleList(nn.Linear(5, 1) for _ in range(2))
    shared = [*trunk.parameters(), *norm.parameters()]

    def losses() -> list[Tensor]:
        features = norm(trunk(x.bfloat16()).float())
        return [(head(features) - i).square().mean() for i, head in enumerate(heads)]

    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses()]
    J = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in rows])
    for _ in range(steps):
        result = mtlfast.backward(losses(), AGGREGATORS[aggregator](), shared=shared, diagnostics=True)
    assert torch.allclose(result.gram, J @ J.T, rtol=1e-5)
    assert torch.allclose(result.norms, J.norm(dim=1), rtol=1e-5)
    for t, p in enumerate(shared):
        assert p.grad.dtype == p.dtype
        wanted = steps * sum(w * row[t].double() for w, row in zip(result.weights, rows, strict=True))
        assert torch.allclose(p.grad.double(), wanted, rtol=1e-2, atol=1e-2)


def test_norms_alone_of_two_dtypes(x):
    from mtlfast.aggregation import NormBalance

    a, b = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(4))
    losses = [3 * a.float().sum() + 2 * b.sum(), b.sum()]
    result = mtlfast.backward(losses, NormBalance("max"), shared=[a, b])
    assert torch.allclose(result.weights, torch.tensor([1.0, (27 + 16) ** 0.5 / 2]).double(), rtol=1e-5)


def test_an_element_wise_method_says_that_it_takes_one_dtype(x):
    class First(Aggregator):
        def aggregate(self, grads, **context):
            return list(grads.rows[0])

    a, b = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(4))
    with pytest.raises(TypeError, match=r"First: needs .*, but the shared parameters are of torch.bfloat16"):
        mtlfast.backward([a.float().sum() + b.sum()], First(), shared=[a, b])


@pytest.mark.parametrize("where", ["trunk", "heads"])
@pytest.mark.parametrize("steps", [1, 2])
def test_grad_dtype_is_kept(where, steps, x):
    net = Net().bfloat16()
    for p in getattr(net, where).parameters():
        p.grad_dtype = torch.float32
    plain = copy.deepcopy(net)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        q.grad_dtype = p.grad_dtype
    for _ in range(steps):
        sum(plain.losses(x.bfloat16())).backward()
        mtlfast.backward(net.losses(x.bfloat16()), Sum(), shared=net.trunk.parameters())
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype, name
        assert torch.allclose(p.grad.float(), q.grad.float(), rtol=2e-2, atol=2e-2), name


def test_a_grad_of_any_dtype(x):
    net = Net()
    for p in net.trunk.parameters():
        p.grad_dtype = None
        p.grad = torch.ones_like(p, dtype=torch.float64)
    before = {name: p.grad.clone() for name, p in net.trunk.named_parameters()}
    plain = copy.deepcopy(net)
    plain.zero_grad()
    sum(plain.losses(x)).backward()
    mtlfast.backward(net.losses(x), Sum(), shared=net.trunk.parameters())
    for name, p in net.trunk.named_parameters():
        assert torch.allclose(p.grad.float(), (before[name] + plain.trunk.get_parameter(name).grad).float(), atol=1e-6)


class HoldsALeaf(torch.autograd.Function):
    """Its node has an attribute of the name that AccumulateGrad's has."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.variable = held
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_an_attribute_of_a_function_is_no_leaf(x):
    net, held = Net(), nn.Parameter(torch.ones(2))
    losses = [HoldsALeaf.apply(loss, held) for loss in net.losses(x)]
    mtlfast.backward(losses, Sum(), shared=net.trunk.parameters())
    assert held.grad is None
