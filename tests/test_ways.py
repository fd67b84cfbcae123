"""Losses of one forward pass, closures and accumulated micro-batches give the same step, for every method."""

import copy
from collections.abc import Callable

import pytest
import torch
from elementwise import METHODS as ELEMENTWISE
from methods import METHODS, numbers_of_tasks
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import MGDA, Mean, NashMTL, PCGrad, UPGrad
from mtlfast.weighting import UW, Constant, FreezeConverged

MAKES: dict[str, Callable] = {
    name: method.make for name, method in METHODS.items() if not method.cross and method.any_tasks
} | {name: method.make for name, method in ELEMENTWISE.items()}
TASKS = {name: max(numbers_of_tasks(METHODS[name], 4)) if name in METHODS else 4 for name in MAKES}
BATCH, MICRO_BATCHES = 12, 3


class Net(nn.Module):
    """A trunk of two layers of which task 1 reaches the first alone, two heads that share a layer, one beside all."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.trunk = nn.ModuleList([self.first, self.second])
        self.common = nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(num_tasks))
        self.double()

    def loss(self, task: int, x: Tensor) -> Tensor:
        features = self.first(x).tanh()
        if task != 1:
            features = self.second(features).tanh()
        if task in (0, 2):
            features = self.common(features)
        return (self.heads[task](features) - x.sum(1, keepdim=True) + task).square().mean()


WAYS = {
    "one forward": lambda net, x, there: [net.loss(k, x) if k in there else None for k in range(len(net.heads))],
    "closures": lambda net, x, there: [
        (lambda k=k: net.loss(k, x)) if k in there else None for k in range(len(net.heads))
    ],
}


def accumulated(net: Net, x: Tensor, there, how: str, **settings) -> mtlfast.TaskGradientAccumulator:
    accumulator = mtlfast.TaskGradientAccumulator(**settings)
    for part in x.split(BATCH // MICRO_BATCHES):
        accumulator.add(WAYS[how](net, part, there))
    return accumulator


def step(way: str, net: Net, aggregator, there, shared=None, **more):
    """One step of a way, with all gradients afterwards."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, 4, dtype=torch.float64)
    torch.manual_seed(2)
    if way.startswith("accumulated"):
        source = accumulated(net, x, there, way.removeprefix("accumulated "), shared=shared)
        result = mtlfast.backward(source, aggregator, **more)
    else:
        result = mtlfast.backward(WAYS[way](net, x, there), aggregator, shared=shared, **more)
    return result, [p.grad for p in net.parameters()]


ALL_WAYS = [*WAYS, *(f"accumulated {how}" for how in WAYS)]


def assert_same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ALL_WAYS[1:])
@pytest.mark.parametrize("name", MAKES)
def test_every_way_gives_the_same_step(name, way):
    num_tasks, make = TASKS[name], MAKES[name]
    net, other = Net(num_tasks), Net(num_tasks)
    one, two = make(), make()
    for _ in range(2):  # the second step adds to `.grad`, and has a state behind it
        result, grads = step(way, net, one, range(num_tasks), net.trunk)
        wanted, plain = step("one forward", other, two, range(num_tasks), other.trunk)
        assert_same(grads, plain)
        assert torch.allclose(result.losses, wanted.losses)
    assert_same(one.state_dict().values(), two.state_dict().values())


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize("there", [(0, 1, 2), (0, 2, 3), (1, 3), (2,)])
@pytest.mark.parametrize("weighting", [None, UW, Constant, "zeros", FreezeConverged])
def test_every_way_with_absent_tasks_and_weightings(way, there, weighting):
    def made():
        if weighting is None:
            return {}
        if weighting == "zeros":
            return {"weighting": Constant(torch.zeros(4))}
        if weighting is Constant:
            return {"weighting": Constant(torch.tensor([0.5, 2.0, 0.0, 1.5]))}
        return {"weighting": weighting(4)}

    net, other, mine, plain = Net(4), Net(4), made(), made()
    result, grads = step(way, net, PCGrad(order="fixed"), there, net.trunk, **mine)
    wanted, truth = step("one forward", other, PCGrad(order="fixed"), there, other.trunk, **plain)
    assert result.tasks == wanted.tasks == there
    assert_same(grads, truth)
    assert_same([result.weights, result.loss_weights], [wanted.weights, wanted.loss_weights])
    for a, b in zip(mine.values(), plain.values(), strict=True):
        assert_same([p.grad for p in a.parameters()], [p.grad for p in b.parameters()])


@pytest.mark.parametrize("way", ALL_WAYS)
def test_shared_parameters_are_found(way):
    net, other = Net(4), Net(4)
    _, grads = step(way, net, UPGrad(), range(4))
    shared = [net.first, net.second, net.common]
    _, truth = step("one forward", other, UPGrad(), range(4), [other.first, other.second, other.common])
    assert_same(grads, truth)
    assert len(shared) == 3


def test_the_parameters_behind_features_are_shared():
    net, other, x = Net(4), Net(4), torch.ones(3, 4).double()

    def losses(net):
        features = net.second(net.first(x).tanh()).tanh()
        return features, {f"task {k}": (head(features) - k).square().mean() for k, head in enumerate(net.heads)}

    features, named = losses(net)
    result = mtlfast.backward(named, UPGrad(), features=[features])
    assert result.names == ("task 0", "task 1", "task 2", "task 3")
    mtlfast.backward(losses(other)[1], UPGrad(), shared=other.trunk)
    assert_same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


def test_a_task_counts_by_the_micro_batches_that_it_was_in():
    net, other = Net(3), Net(3)
    torch.manual_seed(1)
    parts = torch.randn(3, 4, 4, dtype=torch.float64)
    present = [(0, 1), (0, 2), (0,)]
    accumulator = mtlfast.TaskGradientAccumulator(net.trunk)
    for part, there in zip(parts, present, strict=True):
        accumulator.add([net.loss(k, part) if k in there else None for k in range(3)])
    assert len(accumulator) == 3
    result = mtlfast.backward(accumulator, NashMTL())
    assert result.tasks == (0, 1, 2)
    assert len(accumulator) == 0
    batches = [parts.flatten(0, 1), parts[0], parts[1]]
    mtlfast.backward([other.loss(k, x) for k, x in enumerate(batches)], NashMTL(), shared=other.trunk)
    assert_same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


def test_sums_are_not_divided():
    net, other = Net(3), Net(3)
    x = torch.randn(BATCH, 4, dtype=torch.float64)
    accumulator = mtlfast.TaskGradientAccumulator(net.trunk, reduction="sum")
    for part in x.split(4):
        accumulator.add([net.loss(k, part) / 3 for k in range(3)])
    mtlfast.backward(accumulator, Mean())
    mtlfast.backward([other.loss(k, x) for k in range(3)], Mean(), shared=other.trunk)
    assert_same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


def test_a_closure_runs_after_the_graph_before_it_is_freed():
    net, x = Net(3), torch.randn(5, 4, dtype=torch.float64)
    alive: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            alive.append(1)
            ctx.held = Held()
            return loss.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Held:
        def __del__(self):
            alive.pop()

    most = []

    def closure(k):
        loss = Watched.apply(net.loss(k, x))
        most.append(len(alive))
        return loss

    mtlfast.backward([lambda k=k: closure(k) for k in range(3)], MGDA(), shared=net.trunk)
    assert most == [1, 1, 1]


def test_random_numbers_and_batch_norm_are_those_of_separate_forward_passes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    other = copy.deepcopy(net)
    batches = torch.randn(2, 8, 4)
    torch.manual_seed(1)
    result = mtlfast.backward([lambda k=k: net(batches[k])[:, k].mean() for k in range(2)], Mean(), shared=net)
    torch.manual_seed(1)
    losses = []
    for k in range(2):
        losses.append(other(batches[k])[:, k].mean())
        (losses[-1] / 2).backward()
    assert torch.equal(result.losses, torch.stack(losses))
    assert_same(net.buffers(), other.buffers())
    assert_same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])
