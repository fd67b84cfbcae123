"""mtlfast.backward on real graphs: what it writes to .grad, what it leaves alone, and what an error leaves behind."""

import copy
import gc

import pytest
import torch
from torch import nn

import mtlfast
from mtlfast import _native
from mtlfast.aggregation import Aggregator, Constant, Mean, PCGrad, Sum


class Net(nn.Module):
    """A trunk with a convolution, a normalisation and a tied weight; heads one of which two tasks share."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 8)
        )
        self.own = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))
        self.common = nn.Linear(2, 1)

    def losses(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.trunk(x).tanh()
        outputs = [head(features) for head in self.own]
        return [
            self.common(outputs[0]).square().mean(),
            -self.common(outputs[1]).mean(),
            outputs[2].square().sum() * 3,
        ]


@pytest.fixture
def net() -> Net:
    return Net().double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 1, 4, 4, dtype=torch.float64)


def grads_of(module: nn.Module) -> list:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def assert_equal(a: list, b: list) -> None:
    for left, right in zip(a, b, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.allclose(left, right, rtol=1e-9, atol=1e-12)


def by_hand(net: Net, x: torch.Tensor, weights) -> list:
    """The gradients if the trunk gets the weighted sum and all other parameters the plain sum."""
    other = copy.deepcopy(net)
    for loss, weight in zip(other.losses(x), weights, strict=True):
        trunk = torch.autograd.grad(loss, list(other.trunk.parameters()), retain_graph=True)
        for p, g in zip(other.trunk.parameters(), trunk, strict=True):
            p.grad = g * weight if p.grad is None else p.grad + g * weight
        loss.backward(inputs=[*other.own.parameters(), *other.common.parameters()])
    return grads_of(other)


def test_sum_is_the_plain_backward_pass(net, x):
    plain = copy.deepcopy(net)
    sum(plain.losses(x)).backward()
    result = mtlfast.backward(net.losses(x), Sum(), shared=net.trunk.parameters())
    assert_equal(grads_of(net), grads_of(plain))
    assert result.weights.tolist() == [1.0] * 3
    assert result.gram is None
    assert result.norms is None
    assert result.cosines is None
    assert torch.allclose(result.losses, torch.stack(plain.losses(x)).detach())
    assert result.tasks == (0, 1, 2)


def test_weights_reach_the_trunk_alone(net, x):
    weights = [0.5, -2.0, 3.0]
    mtlfast.backward(net.losses(x), Constant(torch.tensor(weights)), shared=net.trunk.parameters())
    assert_equal(grads_of(net), by_hand(net, x, weights))


def test_pcgrad_and_its_result(net, x):
    result = mtlfast.backward(net.losses(x), PCGrad(order="fixed"), shared=net.trunk.parameters())
    rows = [torch.autograd.grad(loss, list(net.trunk.parameters()), retain_graph=True) for loss in _kept(net, x)]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    direction = torch.cat([p.grad.flatten() for p in net.trunk.parameters()])
    assert torch.allclose(direction, mtlfast.reference.pcgrad(J).sum(0))
    assert torch.allclose(result.gram, J @ J.T)
    assert torch.allclose(result.norms, J.norm(dim=1))
    assert torch.allclose(result.cosines, (J @ J.T) / J.norm(dim=1).outer(J.norm(dim=1)))


def _kept(net, x):
    losses = net.losses(x)
    net._keep = losses
    return losses


def test_adds_to_existing_gradients(net, x):
    first = copy.deepcopy(net)
    mtlfast.backward(net.losses(x), PCGrad(order="fixed"), shared=net.trunk.parameters())
    once = grads_of(net)
    held = [p.grad for p in net.parameters()]
    mtlfast.backward(net.losses(x), PCGrad(order="fixed"), shared=net.trunk.parameters())
    assert_equal(grads_of(net), [2 * g for g in once])
    assert all(p.grad is g for p, g in zip(net.parameters(), held, strict=True))
    # Some have a gradient, some have none, and one has other strides than autograd's.
    parameters = list(first.trunk.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    parameters[-2].grad = torch.ones(parameters[-2].shape[::-1], dtype=torch.float64).T
    mtlfast.backward(first.losses(x), PCGrad(order="fixed"), shared=parameters)
    for p, g, had in zip(parameters, once[:6], [True, False, False, False, True, False], strict=True):
        assert torch.allclose(p.grad, g + had)


def test_absent_task(net, x):
    losses = net.losses(x)
    losses[1] = None
    result = mtlfast.backward(losses, Mean(), shared=net.trunk.parameters())
    assert result.tasks == (0, 2)
    assert result.weights.tolist() == [0.5, 0.5]
    assert net.own[1].weight.grad is None
    assert_equal([net.own[2].weight.grad], [by_hand(net, x, [1, 1, 1])[10]])


def test_what_is_frozen_or_unreached_keeps_no_gradient(net, x):
    net.trunk[0].weight.requires_grad_(False)
    net.common.requires_grad_(False)
    spare = nn.Parameter(torch.ones(3))
    mtlfast.backward(net.losses(x), PCGrad(), shared=[*net.trunk.parameters(), spare])
    assert net.trunk[0].weight.grad is None
    assert net.common.weight.grad is None
    assert spare.grad is None
    assert net.trunk[4].weight.grad is not None


def test_a_shared_parameter_that_some_tasks_reach():
    p, q = (nn.Parameter(torch.randn(3)) for _ in range(2))
    result = mtlfast.backward([p.sum(), (p * q).sum()], PCGrad(order="fixed"), shared=[p, q])
    J = torch.stack([torch.cat([torch.ones(3), torch.zeros(3)]), torch.cat([q, p]).detach()])
    direction = mtlfast.reference.pcgrad(J.double()).sum(0).float()
    assert torch.allclose(torch.cat([p.grad, q.grad]), direction, atol=1e-6)
    assert torch.allclose(result.gram, J.double() @ J.double().T)


def test_one_tensor_for_two_parameters_and_for_two_tasks():
    # autograd gives one tensor for p and q of p + q, and an expanded one for a sum.
    for shared_too in (True, False):
        p, q, a, b = (nn.Parameter(torch.randn(4)) for _ in range(4))
        losses = [(p + q).square().sum() + (a + b).sum(), (p + q).sum() + (a + b).sum()]
        inner = 2 * (p + q).detach() + 1
        shared = [p, q, a, b] if shared_too else [p, q]
        mtlfast.backward(losses, Sum(), shared=shared)
        for parameter, want in [
            (p, inner),
            (q, inner),
            (a, torch.full((4,), 2.0)),
            (b, torch.full((4,), 2.0)),
        ]:
            assert torch.allclose(parameter.grad, want)
        pointers = {parameter.grad.data_ptr() for parameter in (p, q, a, b)}
        assert len(pointers) == 4
        assert all(parameter.grad.is_contiguous() for parameter in (p, q, a, b))


def test_a_gradient_that_somebody_holds_is_not_written_to():
    kept = torch.full((4,), 5.0)

    class Keeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return kept

    p, head = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    mtlfast.backward([Keeper.apply(p) + Keeper.apply(head), p.sum()], Sum(), shared=[p])
    assert p.grad.tolist() == [6.0] * 4
    assert kept.tolist() == [5.0] * 4
    head.grad.zero_()
    assert kept.tolist() == [5.0] * 4


def test_gradients_lie_as_their_parameters(x):
    net = Net().double().to(memory_format=torch.channels_last)
    mtlfast.backward(net.losses(x), PCGrad(), shared=net.trunk.parameters())
    for p in net.parameters():
        assert p.grad.stride() == p.stride()
        assert p.grad.dtype == p.dtype


def test_a_leaf_as_loss_and_losses_as_a_tensor():
    p, q = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    mtlfast.backward([p, p * q], Sum(), shared=[p])
    assert p.grad == 4.0
    assert q.grad == 2.0
    r = nn.Parameter(torch.ones(3))
    mtlfast.backward(torch.stack([r.sum(), (2 * r).sum()]), Sum(), shared=[r])
    assert r.grad.tolist() == [3.0] * 3
    s = nn.Parameter(torch.ones(1))
    mtlfast.backward([s * 2, s * 3], Sum(), shared=[s])  # one element is a scalar
    assert s.grad.tolist() == [5.0]


def test_the_graph_is_freed_unless_it_is_kept(net, x):
    losses = net.losses(x)
    mtlfast.backward(losses, Sum(), shared=net.trunk.parameters(), retain_graph=True)
    mtlfast.backward(losses, Sum(), shared=net.trunk.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        mtlfast.backward(losses, Sum(), shared=net.trunk.parameters())


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_every_gradient_as_it_was(net, x, existing):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("third task breaks")

    class Refuses(Aggregator):
        def aggregate(self, grads, **context):
            raise RuntimeError("no direction")

    if existing:
        sum(net.losses(x)).backward()
    before = grads_of(net)
    losses = net.losses(x)
    with pytest.raises(RuntimeError, match="third task breaks"):
        mtlfast.backward([*losses[:2], Broken.apply(losses[2])], PCGrad(), shared=net.trunk.parameters())
    with pytest.raises(RuntimeError, match="no direction"):
        mtlfast.backward(net.losses(x), Refuses(), shared=net.trunk.parameters())
    assert_equal(grads_of(net), before)


def test_aggregators_without_weights(net, x):
    class First(Aggregator):
        def aggregate(self, grads, **context):
            return list(grads.rows[0])

    result = mtlfast.backward(net.losses(x), First(), shared=net.trunk.parameters(), diagnostics=True)
    assert result.weights is None
    assert result.gram.shape == (3, 3)
    assert_equal(grads_of(net), by_hand(net, x, [1, 0, 0]))


def test_not_finite_reaches_the_gradients(net, x):
    losses = net.losses(x)
    losses[1] = losses[1] * torch.inf
    mtlfast.backward(losses, PCGrad(), shared=net.trunk.parameters())
    assert not all(p.grad.isfinite().all() for p in net.trunk.parameters())


def test_trains_under_a_loss_scaler_and_autocast():
    torch.manual_seed(1)
    trunk, heads = nn.Linear(4, 8), nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x = torch.randn(32, 4)
    history = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = trunk(x).relu()
            losses = [(heads[k](features).float() - x[:, k : k + 1]).square().mean() for k in range(2)]
        optimizer.zero_grad()
        step = mtlfast.backward([scaler.scale(loss) for loss in losses], PCGrad(), shared=trunk.parameters())
        scaler.step(optimizer)
        scaler.update()
        history.append(step.losses.sum().item() / 2.0**16)
    assert history[-1] < 0.7 * history[0]


@pytest.mark.native
def test_peak_memory_is_the_task_gradients_alone():
    # .grad takes over task 0's tensors: no allocation of a parameter's size happens after the last backward pass.
    p = nn.Parameter(torch.randn(300_000))
    losses = [(p * p * c).sum() for c in (1.0, -2.0, 3.0)]
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as seen:
        mtlfast.backward(losses, PCGrad(), shared=[p])
    events = [e for e in seen.events() if "autograd::engine" not in e.name and e.cpu_memory_usage >= p.nbytes]
    outside = [e for e in events if e.cpu_parent is None]
    assert [e.name for e in outside] == []
    del p, losses
    gc.collect()


@pytest.mark.native
def test_what_nobody_else_holds_is_exclusive():
    p = nn.Parameter(torch.randn(5))
    held = torch.ones(5)
    rows = [torch.autograd.grad((p * 2).sum(), [p]), (held,), (None,)]
    assert _native.C.exclusive(rows[:1]) == [True]
    assert _native.C.exclusive(rows[1:2]) == [False]
    assert _native.C.exclusive(rows[2:]) == [True]
    view = rows[0][0].view(5)
    assert _native.C.exclusive(rows[:1]) == [False]
    del view
