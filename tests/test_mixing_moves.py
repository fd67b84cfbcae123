"""Steps whose graphs have one structure and move rows in different ways, and samples that cancel in float64."""

from collections.abc import Callable

import pytest
import torch
from mixing_models import MIXINGS, D, Model, S, T, assert_same_grads, assert_same_gram, rows
from torch import Tensor, nn
from torch.nn import functional as F

import mtlfast
from mtlfast.aggregation import MGDA, Constant

pytestmark = pytest.mark.native

ORDERS = (torch.arange(S), torch.tensor([2, 0, 1, 4, 3]))


class Moved(nn.Module):
    """Two linear layers, with something between them that depends on the step."""

    def __init__(self, between: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between, self.number = nn.Linear(D, D), nn.Linear(D, D), between, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x)), self.number))


def assert_each_step_as_stored(net: nn.Module, numbers=(0, 1, 0, 1)) -> list[str]:
    """Compares the steps of one model with the stored way's, and returns the ways of their plans."""
    A, ways = MIXINGS["dense"](), []
    for number in numbers:
        net.trunk.number = number
        found = []
        for way in ("auto", "stored"):
            net.zero_grad()
            made = mtlfast.backward(
                net.losses(), Constant([1.0, -2.0, 3.0]), shared=net.trunk, mixing=A, jacobian=way, diagnostics=True
            )
            found.append((made.gram, {name: p.grad for name, p in net.named_parameters()}))
            ways += [made.plan.way] if way == "auto" else []
        assert_same_gram(found[0][0], found[1][0])
        assert_same_grads(found[0][1], found[1][1], scale=float(found[1][0].diagonal().max().sqrt()))
    return ways


def in_order(move: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Moves rows to the order of the step, so that in odd steps a row belongs to another sample than its place says."""

    def moved(x: Tensor, number: int) -> Tensor:
        return move(x, ORDERS[number])

    return moved


def along(order: Tensor) -> Tensor:
    return order.unsqueeze(1).expand(S, D)


MOVES = {
    "gather": lambda x, order: x.gather(0, along(order)),
    "take_along_dim": lambda x, order: torch.take_along_dim(x, along(order), 0),
    "index_select": lambda x, order: x.index_select(0, order),
    "embedding of activations": lambda x, order: F.embedding(order, x),
    "scatter": lambda x, order: torch.zeros_like(x).scatter(0, along(order), x),
    "scatter_add": lambda x, order: torch.zeros_like(x).scatter_add(0, along(order), x),
    "take": lambda x, order: x.take(order.unsqueeze(1) * D + torch.arange(D)),
    "unbind and stack": lambda x, order: torch.stack([x.unbind(0)[i] for i in order.tolist()]),
    "split and cat": lambda x, order: torch.cat([x.split(1)[i] for i in order.tolist()]),
    "slices": lambda x, order: torch.cat([x[i : i + 1] for i in order.tolist()]),
    "roll": lambda x, order: x.roll(int(order[0]), 0),
    "flip": lambda x, order: x.flip([0 if order[0] else 1]),
    "into a copy": lambda x, order: into(torch.zeros_like(x), x, order),
    "padding": lambda x, order: F.pad(x, (0, 0, int(order[0]), -int(order[0]))),
    "one row more": lambda x, order: torch.cat([x, x.new_zeros(1, D)]).index_select(0, order),
    "within groups": lambda x, order: torch.cat([within(x[:4], order), x[4:]]),
    "a list stacked twice": lambda x, order: twice([torch.tanh(row) for row in x.unbind(0)], order),
}


def within(x: Tensor, order: Tensor) -> Tensor:
    """Two groups of two samples, whose places are changed in a group alone."""
    return x.view(2, 2, D).take_along_dim(order[:4].view(2, 2, 1) % 2, 1).flatten(0, 1)


def into(out: Tensor, x: Tensor, order: Tensor) -> Tensor:
    for i, place in enumerate(order.tolist()):
        out[place] = x[i]
    return out


def twice(rows: list[Tensor], order: Tensor) -> Tensor:
    return torch.stack([rows[i] for i in order.tolist()]) * torch.stack(rows)


def test_dimensions_of_one_size_are_told_apart():
    """Here there are as many places as samples."""
    mixed = {
        "softmax": lambda x, number: x.softmax(1 - number),
        "cumsum": lambda x, number: x.cumsum(1 - number),
        "a mean in another shape": lambda x, number: x + x.mean(1).reshape((S, 1, D) if number == 0 else (1, S, D)),
    }
    for between in mixed.values():
        torch.manual_seed(0)
        net = Model(Moved(between), rows(S, D)).double()
        net.given = net.given.double()
        assert assert_each_step_as_stored(net, (0, 1, 0)) == ["mixing", "stored", "mixing"]


@pytest.mark.whole
@pytest.mark.parametrize("name", MOVES)
def test_rows_that_are_moved_in_another_way_than_before_are_noticed(name):
    torch.manual_seed(0)
    net = Model(Moved(in_order(MOVES[name])), rows(D)).double()
    net.given = net.given.double()
    assert assert_each_step_as_stored(net)[1] != "mixing"


def test_reading_labels_is_not_probed_at_each_step(monkeypatch):
    torch.manual_seed(0)
    labels = torch.arange(S).unsqueeze(1)
    net = Model(Moved(lambda x, number: x.log_softmax(1).gather(1, labels) * x), rows(D)).double()
    net.given, calls = net.given.double(), []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **how: calls.append(1) or grad(*args, **how))
    for _ in range(3):
        calls.clear()
        mtlfast.backward(net.losses(), MGDA(), shared=net.trunk, mixing=MIXINGS["dense"](), jacobian="mixing")
    assert len(calls) == 2  # of the samples, and of the head


class Chosen(nn.Module):
    """Two of three matrices, which a step chooses, or one twice."""

    def __init__(self, take: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.weight, self.take, self.number = nn.Parameter(torch.randn(3, D, D)), take, 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.take(self.weight, 0)) @ self.take(self.weight, 1 - self.number)


@pytest.mark.parametrize("take", [lambda w, i: w.unbind(0)[i], lambda w, i: w.chunk(3)[i][0], lambda w, i: w[i]])
def test_other_parts_than_before_are_noticed(take):
    net = Model(Chosen(take), rows(D)).double()
    net.given = net.given.double()
    assert assert_each_step_as_stored(net) == ["mixing"] * 4


class Viewed(nn.Module):
    """Two views of one parameter with elements in different orders, whose nodes keep the same numbers."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.weight, self.number, self.form = nn.Parameter(torch.randn(36)), 0, form

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.form == "scales":
            views = (w.view(2, 3, 6).permute(1, 0, 2), w.view(3, 2, 6).permute(1, 0, 2))
            return sum((x[:, None, None, :6] * view).cos().sum((1, 2)) for view in views)
        return torch.tanh(x[:, :4] @ w.view(4, 9))[:, :9] @ w.view(9, 4)


@pytest.mark.parametrize("form", ["scales", "matrices"])
def test_views_in_other_orders_are_other_parts(form):
    net = Model(Viewed(form), rows(D), 6 if form == "scales" else 4).double()
    net.given = net.given.double()
    assert_each_step_as_stored(net)


def test_dimensions_that_are_turned_in_another_way_are_noticed():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.number = nn.Parameter(torch.randn(D, D, D)), 0

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight[0]) @ self.weight.transpose(0, 1 + self.number)[1]

    net = Model(Turned(), rows(D)).double()
    net.given = net.given.double()
    assert_each_step_as_stored(net)


class Swapped(nn.Module):
    """Two layers, one for rows in order of samples and one for rows in order of places, which steps exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.number = nn.ModuleList(nn.Linear(D, D) for _ in range(2)), 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layers[self.number](x))
        return self.layers[1 - self.number](x.transpose(0, 1)).transpose(0, 1)


def test_parameters_that_change_places_are_noticed():
    net = Model(Swapped(), rows(T, D)).double()
    net.given = net.given.double()
    assert assert_each_step_as_stored(net) == ["mixing"] * 4


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7])
def test_samples_that_cancel_in_float64(noise):
    torch.manual_seed(0)
    net = Model(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), rows(D)).double()
    net.given = net.given[:1].double() + noise * torch.randn(S, D, dtype=torch.float64)
    A = torch.eye(S, dtype=torch.float64)[:3] - torch.eye(S, dtype=torch.float64)[1:4]
    grams = [
        mtlfast.backward(net.losses(), MGDA(), shared=net.trunk, mixing=A, jacobian=way, diagnostics=True).gram
        for way in ("mixing", "stored")
    ]
    assert_same_gram(*grams, rtol=1e-16 / noise * 100)


@pytest.mark.parametrize("empty", ["prompt", "rows", "table"])
def test_parts_without_elements_take_a_pass_for_each_task(empty):
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.number = nn.Parameter(torch.randn(D, D)), 0
            self.prompt = nn.Parameter(torch.randn(1, 0, D))
            self.table = nn.Embedding(3, 0)

        def forward(self, x: Tensor) -> Tensor:
            if empty == "prompt":
                x = torch.cat([self.prompt.expand(S, -1, -1), x], dim=1)
            if empty == "rows":
                x = torch.cat([x, x @ self.weight[:0].mT], dim=2)
            if empty == "table":
                x = torch.cat([x, self.table(torch.zeros(S, T, dtype=torch.long))], dim=2)
            return x @ self.weight

    net = Model(Empty(), rows(T, D)).double()
    net.given = net.given.double()
    assert assert_each_step_as_stored(net, [0])[0] != "mixing"
