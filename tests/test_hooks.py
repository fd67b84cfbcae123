"""Hooks on parameters and features, optimizers in the backward pass, and tables that update themselves in it."""

import pytest
import torch
from passes import Breaks
from torch import Tensor, nn
from ways import MICRO_BATCHES, WAYS, passes, step

import mtlfast
from mtlfast.aggregation import Mean, PCGrad, Sum
from mtlfast.weighting import UW

NUM_TASKS = 3


def model(device: str = "cpu") -> tuple[nn.Sequential, nn.ModuleList]:
    torch.manual_seed(3)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(NUM_TASKS))
    return trunk.to(device), heads.to(device)


def batch(device: str = "cpu") -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(4)).to(device)


def everything(trunk: nn.Module, heads: nn.Module) -> list[nn.Parameter]:
    return [*trunk.parameters(), *heads.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_tensor_hooks_see_each_tasks_gradient(way):
    (trunk, heads), (other, _) = model(), model()
    seen: dict[int, list[Tensor]] = {}
    for p in everything(trunk, heads):
        p.register_hook(lambda g, p=p: seen.setdefault(id(p), []).append(g.clone()))
    step(way, trunk, heads, batch(), Sum())
    assert all(len(seen[id(p)]) == passes(way, NUM_TASKS) for p in trunk.parameters())
    of_one_task = MICRO_BATCHES if way == "accumulator" else 1
    assert all(len(seen[id(p)]) == of_one_task for p in heads.parameters())
    if way == "losses":
        features = other(batch())
        for k, head in enumerate(heads):
            (gradient,) = torch.autograd.grad(
                (head(features) - k).square().mean(), other[0].weight, retain_graph=k < NUM_TASKS - 1
            )
            assert torch.equal(seen[id(trunk[0].weight)][k], gradient)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_tensor_hook_returns_counts(way):
    """A hook that scales: the surgery is that of a graph which scales."""

    class Scaled(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            first, *rest = self.layers
            weight = first.weight * 3 - first.weight.detach() * 2  # the value of the weight, three times its gradient
            return nn.Sequential(*rest)(nn.functional.linear(x, weight, first.bias))

    (trunk, heads), (other, plain) = model(), model()
    trunk[0].weight.register_hook(lambda g: 3 * g)
    result = step(way, trunk, heads, batch(), PCGrad(order="fixed"), diagnostics=True)
    wanted = step(way, Scaled(other), plain, batch(), PCGrad(order="fixed"), diagnostics=True)
    torch.testing.assert_close(result.gram, wanted.gram)
    for a, b in zip(everything(trunk, heads), everything(other, plain), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_torch_knows_no_hook_on_several_parameters_in_autograd_grad():
    trunk, heads = model()
    seen, shared = [], list(trunk.parameters())
    torch.autograd.graph.register_multi_grad_hook(shared, lambda grads: seen.append([g is not None for g in grads]))
    step("at", trunk, heads, batch(), Sum())
    assert seen == [[True] * len(shared)]
    for p in everything(trunk, heads):
        p.grad = None
    with pytest.raises(RuntimeError, match="not supported"):
        step("losses", trunk, heads, batch(), Sum())
    assert all(p.grad is None for p in everything(trunk, heads))


def test_a_hook_on_features_runs_once_for_the_gradient_that_goes_below():
    (trunk, heads), (other, plain) = model(), model()
    features, seen = trunk(batch()), []
    features.register_hook(lambda g: seen.append(g) or g * 0.1)
    features.retain_grad()
    losses = [head(features).square().mean() for head in heads]
    mtlfast.backward(losses, Sum(), at=features, retain_graph=True)
    assert len(seen) == 1
    wanted = other(batch())
    wanted.register_hook(lambda g: g * 0.1)
    sum(head(wanted).square().mean() for head in plain).backward()
    for a, b in zip(everything(trunk, heads), everything(other, plain), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(features.grad, 0.1 * seen[0])  # as in a plain backward pass
    sum(losses).backward()  # the hook is still there
    assert len(seen) == 2


@pytest.mark.parametrize("existing", [False, True], ids=["no grad before", "a grad before"])
@pytest.mark.parametrize("way", WAYS)
def test_post_accumulate_hooks_see_the_final_gradient_once(way, existing):
    trunk, heads = model()
    unreached, weighting = nn.Parameter(torch.ones(2)), UW(NUM_TASKS)
    trunk.register_parameter("unreached", unreached)
    trunk[2].requires_grad_(False)
    trained = everything(trunk, heads) + list(weighting.parameters())
    seen: list[tuple[int, Tensor]] = []
    for p in trained:
        if existing and p.requires_grad and p is not unreached:
            p.grad = torch.full_like(p, 0.5)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: seen.append((id(p), p.grad.clone())))
    frozen = nn.Parameter(torch.ones(6, 5), requires_grad=True)
    frozen.register_post_accumulate_grad_hook(lambda p: seen.append((id(p), p.grad)))
    frozen.requires_grad_(False)
    trunk.register_parameter("frozen", frozen)

    step(way, trunk, heads, batch(), PCGrad(order="fixed"), weighting=weighting)
    expected = {id(p): p.grad for p in trained if p.requires_grad and p is not unreached}
    assert sorted(key for key, _ in seen) == sorted(expected)
    assert all(torch.equal(gradient, expected[key]) for key, gradient in seen)
    assert frozen.grad is unreached.grad is trunk[2].weight.grad is None

    other, plain = model()
    other[2].requires_grad_(False)
    step(way, other, plain, batch(), PCGrad(order="fixed"), weighting=UW(NUM_TASKS))
    for a, b in zip(everything(trunk, heads), [unreached, frozen, *everything(other, plain)], strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad + 0.5 if existing else b.grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_in_the_backward_pass_trains_as_one_after_it(make, way, device):
    (trunk, heads), (other, plain) = model(device), model(device)
    optimizers = {p: make([p], lr=0.05) for p in everything(trunk, heads)}

    def update(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(update)
    after = make(everything(other, plain), lr=0.05)
    for _ in range(3):
        step(way, trunk, heads, batch(device), PCGrad(order="fixed"))
        step(way, other, plain, batch(device), PCGrad(order="fixed"))
        after.step()
        after.zero_grad()
        assert all(p.grad is None for p in optimizers)
    if device == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(everything(trunk, heads), everything(other, plain), strict=True))
    else:  # the plain optimizer may use other kernels there (foreach)
        torch.testing.assert_close(everything(trunk, heads), everything(other, plain))


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_writes_to_its_parameter_as_in_a_plain_backward_pass(way):
    (trunk, heads), (other, plain) = model(), model()
    modes = []

    def update(p: Tensor) -> None:
        modes.append(torch.is_grad_enabled())
        p.sub_(p.grad, alpha=0.1)  # autograd refuses this outside of no_grad

    for p in everything(trunk, heads):
        p.register_post_accumulate_grad_hook(update)
    step(way, trunk, heads, batch(), Mean())
    step(way, other, plain, batch(), Mean())
    assert modes == [False] * len(everything(trunk, heads))
    for a, b in zip(everything(trunk, heads), everything(other, plain), strict=True):
        torch.testing.assert_close(a, b - 0.1 * b.grad)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_move_to_the_host_as_they_come(way, device):
    (trunk, heads), (other, plain) = model(device), model(device)
    host: dict[Tensor, Tensor] = {}

    def offload(p: Tensor) -> None:
        host[p] = p.grad.to("cpu", copy=True)
        p.grad = None

    for p in everything(trunk, heads):
        p.register_post_accumulate_grad_hook(offload)
    step(way, trunk, heads, batch(device), PCGrad(order="fixed"))
    step(way, other, plain, batch(device), PCGrad(order="fixed"))
    for p, wanted in zip(everything(trunk, heads), everything(other, plain), strict=True):
        assert p.grad is None
        torch.testing.assert_close(host[p], wanted.grad.cpu())


@pytest.mark.parametrize("way", [way for way in WAYS if way != "at"])
def test_a_hook_that_raises_leaves_a_step_that_is_complete(way):
    (trunk, heads), (other, plain) = model(), model()
    first = trunk[0].weight
    first.register_post_accumulate_grad_hook(lambda p: (_ for _ in ()).throw(KeyError("planted")))
    with pytest.raises(KeyError, match="planted"):
        step(way, trunk, heads, batch(), PCGrad(order="fixed"))
    step(way, other, plain, batch(), PCGrad(order="fixed"))
    for a, b in zip(everything(trunk, heads), everything(other, plain), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_hook_that_raises_below_features_leaves_no_gradient():
    trunk, heads = model()
    trunk[0].weight.register_post_accumulate_grad_hook(lambda p: (_ for _ in ()).throw(KeyError("planted")))
    with pytest.raises(KeyError, match="planted"):
        step("at", trunk, heads, batch(), PCGrad(order="fixed"))
    assert all(p.grad is None for p in everything(trunk, heads))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_add_and_remove_hooks(kind, way):
    """As in a plain backward pass: the hooks that are there when a gradient arrives are called, the others not."""

    def run(backward) -> list[str]:
        trunk, heads = model()
        weight, log = trunk[0].weight, []
        register = getattr(weight, kind)

        def first(*_):
            log.append("first")
            second.remove()
            if len(log) == 1:
                register(lambda *_: log.append("third"))

        register(first)
        second = register(lambda *_: log.append("second"))
        backward(trunk, heads)
        backward(trunk, heads)
        return log

    def plain(trunk, heads):
        calls = passes(way, NUM_TASKS) if kind == "register_hook" else 1
        for _ in range(calls):
            sum(head(trunk(batch())).square().mean() for head in heads).backward()

    assert run(lambda trunk, heads: step(way, trunk, heads, batch(), Sum())) == run(plain)


class Lookup(torch.autograd.Function):
    """Rows of a table, which its backward pass updates. The dummy makes autograd call it, and gets no gradient."""

    @staticmethod
    def forward(ctx, dummy, table, ids):
        ctx.table, ctx.ids = table, ids
        return table.weight[ids]

    @staticmethod
    def backward(ctx, gradient):
        ctx.table.updates += 1
        ctx.table.weight.index_add_(0, ctx.ids, gradient, alpha=-ctx.table.rate)
        return None, None, None


class Table(nn.Module):
    """An embedding table that updates itself in the backward pass, as those of torchrec and fbgemm do."""

    def __init__(self, rows: int, width: int, rate: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.register_buffer("weight", torch.randn(rows, width))
        self.dummy = nn.Parameter(torch.empty(0))
        self.updates, self.rate = 0, rate

    def forward(self, ids: Tensor) -> Tensor:
        return Lookup.apply(self.dummy, self, ids)


@pytest.mark.parametrize("bare", [False, True], ids=["under a trunk", "as the features"])
def test_a_table_that_updates_itself_is_updated_once_a_step(bare):
    (trunk, heads), (other, plain) = model(), model()
    width = 5 if bare else 4
    table = Table(10, width)
    wanted = nn.Embedding(10, width, _weight=table.weight.clone())
    ids = torch.tensor([1, 3, 3, 7])
    optimizer = torch.optim.SGD(wanted.parameters(), lr=table.rate)
    for n in range(3):
        optimizer.zero_grad()
        for rows, top, tasks in ((table(ids), trunk, heads), (wanted(ids), other, plain)):
            features = rows if bare else top(rows)
            losses = [(head(features) - k).square().mean() for k, head in enumerate(tasks)]
            mtlfast.backward(losses, PCGrad(order="fixed"), at=features)
        optimizer.step()
        assert table.updates == n + 1
        torch.testing.assert_close(table.weight, wanted.weight.detach())
    assert table.dummy.grad is None
    for a, b in zip(everything(trunk, heads), everything(other, plain), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_a_table_is_not_updated_by_a_step_that_fails_above_it():
    (trunk, heads), table = model(), Table(10, 4)
    before, features = table.weight.clone(), trunk(table(torch.tensor([1, 2])))
    losses = [head(features).square().mean() for head in heads]
    losses[1] = Breaks.apply(losses[1])
    with pytest.raises(RuntimeError, match="planted"):
        mtlfast.backward(losses, PCGrad(), at=features)
    assert table.updates == 0
    assert torch.equal(table.weight, before)
    assert all(p.grad is None for p in everything(trunk, heads))
