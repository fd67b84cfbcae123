"""A task with a loss weight of 0, or one that reaches no shared parameter, is left out of the shared update."""

import copy

import pytest
import torch
from methods import METHODS, numbers_of_tasks
from passes import Counted
from torch import Tensor, nn

import mtlfast
from mtlfast import TaskGradients
from mtlfast.aggregation import MGDA, Mean, Sum
from mtlfast.weighting import FAMO, Constant, FreezeConverged

DRIVEN = {name: method for name, method in METHODS.items() if not method.cross and method.any_tasks}


class Net(nn.Module):
    """A trunk and heads; a task of `beside` does not reach the trunk."""

    def __init__(self, num_tasks: int, beside: int | None = None) -> None:
        super().__init__()
        self.trunk, self.beside = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), beside
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(num_tasks))
        self.double()

    def losses(self) -> list[Tensor]:
        x = torch.ones(3, 4).double()
        features = self.trunk(x)
        return [
            Counted.apply((head(torch.ones(3, 6).double() if k == self.beside else features) - k).square().mean())
            for k, head in enumerate(self.heads)
        ]


def trained(net: Net, make, losses: list[Tensor | None], **more):
    torch.manual_seed(3)
    aggregator = make()
    Counted.passes = 0
    result = mtlfast.backward(losses, aggregator, shared=net.trunk, **more)
    return result, [p.grad for p in net.trunk.parameters()], aggregator


def assert_same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        # The kernel sums in another order for another number of rows.
        assert a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("name", DRIVEN)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_loss_weight_of_0_is_absence(name, steps):
    (num_tasks, *_) = numbers_of_tasks(DRIVEN[name], 5)
    if num_tasks < DRIVEN[name].least_tasks + 1 or num_tasks < 3:
        pytest.skip("with one task absent there are too few")
    absent = 1
    net = Net(num_tasks)
    other = copy.deepcopy(net)
    weights = torch.ones(num_tasks)
    weights[absent] = 0
    without, plain = DRIVEN[name].make(), DRIVEN[name].make()
    for step in range(steps):
        Counted.passes = 0
        torch.manual_seed(step)
        result = mtlfast.backward(net.losses(), plain, shared=net.trunk, weighting=Constant(weights))
        assert Counted.passes == num_tasks - 1
        losses = other.losses()
        torch.manual_seed(step)
        wanted = mtlfast.backward(
            [None if k == absent else loss for k, loss in enumerate(losses)], without, shared=other.trunk
        )
    present = [k for k in range(num_tasks) if k != absent]
    assert torch.allclose(result.weights[present], wanted.weights, rtol=1e-9, atol=1e-11)
    assert result.weights[absent] == 0
    assert_same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])
    assert all(p.grad is None for p in net.heads[absent].parameters())
    assert_same(plain.state_dict().values(), without.state_dict().values())


@pytest.mark.parametrize("make", [Mean, MGDA])
def test_a_task_that_reaches_nothing_shared_trains_its_head_alone(make):
    net, other = Net(3, beside=1), Net(3, beside=1)
    other.load_state_dict(net.state_dict())
    result, grads, _ = trained(net, make, net.losses())
    losses = other.losses()
    wanted, without, _ = trained(other, make, [losses[0], None, losses[2]])
    assert torch.allclose(result.weights[[0, 2]], wanted.weights)
    assert result.weights[1] == 0
    assert_same(grads, without)
    assert all(p.grad is not None for p in net.heads[1].parameters())


def test_a_gradient_that_is_zero_keeps_its_place():
    # MGDA's update is zero then, because no direction improves a task that is at its minimum.
    net = Net(2)
    losses = net.losses()
    losses[1] = losses[1] * 0
    result, grads, _ = trained(net, MGDA, losses)
    assert result.weights.tolist() == [0, 1]
    assert not any(g.any() for g in grads)


def test_by_hand_a_row_of_none_is_absent():
    rows = [[torch.ones(3), torch.ones(2)], [None, None], [2 * torch.ones(3), None]]
    direction = Mean()(TaskGradients.from_rows(rows))
    assert direction[0].tolist() == [1.5] * 3
    assert direction[1].tolist() == [0.5] * 2


@pytest.mark.parametrize("name", DRIVEN)
def test_where_all_weights_are_0_gradients_are_zeros_as_in_plain_torch(name):
    (num_tasks, *_) = numbers_of_tasks(DRIVEN[name], 4)
    net = Net(num_tasks)
    weighting = Constant(torch.zeros(num_tasks))
    result, _, _ = trained(net, DRIVEN[name].make, net.losses(), weighting=weighting)
    assert result.weights.tolist() == [0] * num_tasks
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("loss", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_is_never_absent(loss):
    # FAMO's weight of an infinite loss is 0, and a GradScaler must still see that the step is lost.
    net = Net(3)
    losses = net.losses()
    losses[0] = losses[0] * loss
    trained(net, Sum, losses, weighting=FAMO(3))
    assert not all(p.grad.isfinite().all() for p in net.trunk.parameters())


def test_a_schedule_that_freezes_a_task():
    net = Net(2)
    weighting = FreezeConverged(2, patience=1, decay=0.0)
    for _ in range(4):
        net.zero_grad()
        result, _, _ = trained(net, MGDA, net.losses(), weighting=weighting)
    frozen = (result.loss_weights == 0).nonzero().flatten().tolist()
    assert frozen
    untouched = (net.heads[k].weight.grad for k in frozen)
    assert all(gradient is None or not gradient.any() for gradient in untouched)  # zeros if no task is left


def test_the_graph_is_freed_when_the_last_task_is_absent():
    net = Net(3)
    losses = net.losses()
    trained(net, MGDA, losses, weighting=Constant(torch.tensor([1.0, 1.0, 0.0])))
    with pytest.raises(RuntimeError, match="second time"):
        trained(net, MGDA, losses)
