"""`at=features`: weights from the features' gradients, one backward pass of the trunk, plain gradients of the heads."""

from functools import partial

import pytest
import torch
from elementwise import METHODS as ELEMENTWISE
from methods import METHODS, numbers_of_tasks
from passes import Counted
from peaks import peak_bytes
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import MGDA, Aggregator, Sum, UPGrad

ALL = {name: method.make for name, method in METHODS.items() if not method.cross and method.any_tasks}


class Net(nn.Module):
    """A trunk whose features K heads read."""

    def __init__(self, num_tasks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(num_tasks))
        self.x = torch.randn(8, 4, dtype=torch.float64)
        self.double()

    def losses(self, features: Tensor) -> list[Tensor]:
        return [(head(features) - k).square().mean() for k, head in enumerate(self.heads)]

    def step(self, aggregator: Aggregator, **more) -> mtlfast.StepResult:
        features = self.trunk(self.x)
        return mtlfast.backward(self.losses(features), aggregator, at=features, **more)

    def grads(self) -> list[Tensor | None]:
        return [p.grad for p in self.parameters()]


def by_hand(net: Net, weights) -> tuple[Tensor, list[Tensor]]:
    """G at the features [K, K], and the gradients of `net` for weights(G), computed by autograd alone."""
    features = net.trunk(net.x)
    losses = net.losses(features)
    rows = torch.stack([torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses])
    gram = rows.flatten(1) @ rows.flatten(1).mT
    direction = torch.einsum("k,k...->...", weights(gram), rows)
    heads = torch.autograd.grad(sum(losses), list(net.heads.parameters()), retain_graph=True)
    return gram, [*torch.autograd.grad(features, list(net.trunk.parameters()), direction), *heads]


def shortest(gram: Tensor) -> Tensor:
    """The weights of the shortest convex combination of two gradients, in closed form."""
    (aa, ab), (_, bb) = gram.tolist()
    first = min(max((bb - ab) / (aa + bb - 2 * ab), 0.0), 1.0)
    return torch.tensor([first, 1 - first], dtype=torch.float64)


def assert_close(grads, wanted) -> None:
    for a, b in zip(grads, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_mgda_ub_by_hand():
    net = Net(2)
    gram, wanted = by_hand(net, shortest)
    result = net.step(MGDA(), diagnostics=True)
    assert torch.allclose(result.gram, gram, rtol=1e-12)
    assert torch.allclose(result.weights, shortest(gram), rtol=1e-9)
    assert_close(net.grads(), wanted)
    assert result.plan.way == "features"


def test_it_approximates_what_the_parameters_gradients_give():
    net, other = Net(), Net()
    net.step(UPGrad())
    mtlfast.backward(other.losses(other.trunk(other.x)), UPGrad(), shared=other.trunk)
    assert not torch.allclose(net.trunk[0].weight.grad, other.trunk[0].weight.grad)


@pytest.mark.parametrize("name", ["UPGrad", "PCGrad, mean, fixed", "CAGrad", "NashMTL", "Krum", "IMTLG"])
def test_every_method_takes_its_weights_from_the_features(name):
    net, twin = Net(4), Net(4)
    _, wanted = by_hand(twin, lambda gram: ALL[name]().weights(gram, rtol=1e-12))
    net.step(ALL[name]())
    assert_close(net.grads(), wanted)


@pytest.mark.parametrize("name", ALL)
def test_it_is_exact_if_the_trunk_is_an_orthogonal_map(name):
    torch.manual_seed(3)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    targets = torch.randn(max(numbers_of_tasks(METHODS[name], 4)), 6, dtype=torch.float64)
    grads = []
    for given in ("at", "shared"):
        torch.manual_seed(4)
        w = nn.Parameter(torch.ones(6, dtype=torch.float64))
        features = turn @ w
        losses = [(features - target).square().sum() for target in targets]
        mtlfast.backward(losses, ALL[name](), **{given: [features if given == "at" else w]})
        grads.append(w.grad)
    assert torch.allclose(*grads, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["Median", "Agreeing"])
def test_element_wise_methods_work_on_the_features(name):
    net, twin = Net(), Net()
    features = twin.trunk(twin.x)
    losses = twin.losses(features)
    rows = [torch.autograd.grad(loss, [features], retain_graph=True) for loss in losses]
    (direction,) = ELEMENTWISE[name].make()(mtlfast.TaskGradients.from_rows(rows))
    heads = torch.autograd.grad(sum(losses), list(twin.heads.parameters()), retain_graph=True)
    net.step(ELEMENTWISE[name].make())
    assert_close(net.grads(), [*torch.autograd.grad(features, list(twin.trunk.parameters()), direction), *heads])


def test_element_wise_methods_are_not_told_parameters_which_last_one_step():
    class Looks(Aggregator):
        def aggregate(self, grads, step, out):
            self.seen = grads.parameters
            return list(grads.rows[0])

    looks = Looks()
    Net().step(looks)
    assert looks.seen is None


def test_one_backward_pass_of_the_trunk_and_one_of_each_head():
    class Heads(Counted):
        passes = 0

        @staticmethod
        def backward(ctx, g):
            Heads.passes += 1
            return g

    net, calls = Net(5), []
    net.trunk[0].weight.register_hook(lambda g: calls.append("trunk"))
    net.heads[0].weight.register_hook(lambda g: calls.append("head"))
    for aggregator in (UPGrad(), ELEMENTWISE["Median"].make()):
        Counted.passes = Heads.passes = 0
        calls.clear()
        features = Counted.apply(net.trunk(net.x))
        losses = net.losses(features)
        mtlfast.backward([Heads.apply(loss) for loss in losses], aggregator, at=features)
        assert (Counted.passes, Heads.passes) == (1, 5)
        assert sorted(calls) == ["head", "trunk"]


def test_several_features_of_several_dtypes():
    net, wide = Net(2), nn.Linear(4, 5)
    low = wide(net.x.float())
    high = net.trunk(net.x)
    losses = [(net.heads[0](high) + low.double().sum()).square().mean(), net.heads[1](high * low).square().mean()]
    rows = [torch.autograd.grad(loss, [high, low], retain_graph=True) for loss in losses]
    J = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in rows])
    result = mtlfast.backward(losses, MGDA(), at={"high": high, "low": low}, diagnostics=True)
    assert torch.allclose(result.gram, J @ J.T, rtol=1e-6)
    assert torch.allclose(result.weights, shortest(J @ J.T), rtol=1e-5)
    assert wide.weight.grad.dtype == torch.float32
    low, high = wide(net.x.float()), net.trunk(net.x)
    expected = r"but the features are of torch\.float32 and torch\.float64, expected one dtype"
    with pytest.raises(TypeError, match=expected):
        mtlfast.backward([(high * low).sum(), low.sum()], ELEMENTWISE["Median"].make(), at=[low, high])


@pytest.mark.parametrize("leaf", [False, True])
def test_tensor_hooks_of_features_run_once_as_in_an_ordinary_pass(leaf):
    net, twin, calls = Net(), Net(), []
    grads = []
    for model, run in (
        (net, lambda losses, features: mtlfast.backward(losses, Sum(), at=features)),
        (twin, lambda losses, features: sum(losses).backward()),
    ):
        features = model.trunk(model.x)
        features = features.detach().requires_grad_() if leaf else features
        handle = features.register_hook(lambda g: calls.append(g) or g / 2)
        run(model.losses(features), features)
        grads.append([features.grad] if leaf else model.grads())
        assert len(features._backward_hooks) == 1
        handle.remove()
        assert len(features._backward_hooks) == 0
    assert_close(calls[:1], calls[1:])
    assert_close(*grads)


def test_a_grad_that_features_retain_is_what_goes_into_the_trunk():
    net = Net()
    features = net.trunk(net.x)
    features.retain_grad()
    mtlfast.backward(net.losses(features), UPGrad(), at=features, retain_graph=True)
    wanted = torch.autograd.grad(features, net.trunk[0].weight, features.grad)[0]
    assert torch.allclose(net.trunk[0].weight.grad, wanted)


def test_existing_gradients_are_added_to():
    net, twin = Net(), Net()
    for _ in range(2):
        net.step(UPGrad())
    twin.step(UPGrad())
    assert_close(net.grads(), [2 * g for g in twin.grads()])


def test_a_kept_graph_serves_another_step():
    net, twin = Net(), Net()
    features = net.trunk(net.x)
    losses = net.losses(features)
    mtlfast.backward(losses, UPGrad(), at=features, retain_graph=True)
    mtlfast.backward(losses, UPGrad(), at=features)
    twin.step(UPGrad())
    assert_close(net.grads(), [2 * g for g in twin.grads()])
    with pytest.raises(RuntimeError, match="a second time"):
        mtlfast.backward(losses, UPGrad(), at=features)
    assert_close(net.grads(), [2 * g for g in twin.grads()])


def test_memory_is_that_of_the_features_and_of_one_gradient():
    trunk = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    heads = [nn.Linear(256, 1) for _ in range(8)]
    size = sum(p.numel() * p.element_size() for p in trunk.parameters())
    peaks = []
    for given in ("at", "shared"):
        trunk.zero_grad()
        features = trunk(torch.randn(4, 256))
        losses = [head(features).square().mean() for head in heads]
        source = {"at": features} if given == "at" else {"shared": trunk, "jacobian": "stored"}
        peaks.append(peak_bytes(partial(mtlfast.backward, losses, UPGrad(), **source)) / size)
    assert peaks[0] < 1.2
    assert peaks[1] > 7
