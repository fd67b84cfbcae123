"""The walk of the autograd graph: what losses reach, found natively and by the twin in Python."""

import gc
import random
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtlfast import _native
from mtlfast.jacobian import _graph
from mtlfast.jacobian._graph import dependent, reached_by


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "python"], autouse=True)
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs each test with the extension and without it."""
    if request.param == "python":
        monkeypatch.setattr(_native, "module", lambda: None)
    return request.param


class Twice(torch.autograd.Function):
    """A function with attributes of its own that look like a leaf's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.variable = torch.zeros(2, requires_grad=True)
        ctx.kept = x * 1
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Two(torch.autograd.Function):
    """A function with two outputs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor) -> Tensor:
        return 2 * first + 3 * second


def leaf() -> Tensor:
    return torch.ones(3, requires_grad=True)


def shared_by(losses: list[Tensor], leaves: list[Tensor], stop_at: tuple[Tensor, ...] = ()) -> list[bool | None]:
    """For each of the leaves, whether several losses reach it; None if no loss does. There may be no other leaf."""
    found = reached_by(losses, stop_at)
    ids = [id(one) for one in found.leaves]
    assert len(set(ids)) == len(ids) == len(found.by_several)
    assert set(ids) <= {id(one) for one in leaves}
    answers = dict(zip(ids, found.by_several, strict=True))
    return [answers.get(id(one)) for one in leaves]


# Which leaves are found, and which of them several losses reach.


def test_a_diamond():
    w, own = leaf(), leaf()
    h = w.sin()
    assert shared_by([(h.cos() + h.exp()).sum(), (h * own).sum()], [w, own]) == [True, False]


def test_two_paths_of_one_loss_are_one_loss():
    w, own = leaf(), leaf()
    assert shared_by([(w.sin() * w.cos() + w).sum(), own.sum()], [w, own]) == [False, False]


def test_a_later_loss_marks_all_that_is_behind_the_meeting():
    a, b, c, d = leaf(), leaf(), leaf(), leaf()
    low = a.sin() * b
    losses = [(low * c).sum(), d.exp().sum(), (low.exp() * d).sum()]
    assert shared_by(losses, [a, b, c, d]) == [True, True, False, True]


def test_tied_parameters_and_a_module_used_twice():
    tied, once, x = nn.Linear(3, 3), nn.Linear(3, 3), torch.ones(2, 3)
    losses = [tied(once(tied(x))).sum(), nn.functional.linear(x, tied.weight).sum()]
    known = [tied.weight, tied.bias, once.weight, once.bias]
    assert shared_by(losses, known) == [True, False, False, False]


def test_the_same_loss_twice_counts_as_two():
    w = leaf()
    loss = w.sum()
    assert shared_by([loss, loss], [w]) == [True]
    assert shared_by([loss], [w]) == [False]


def test_a_leaf_may_be_a_loss():
    w = torch.ones((), requires_grad=True)
    assert shared_by([w], [w]) == [False]
    assert shared_by([w, 3 * w], [w]) == [True]
    assert shared_by([w, w], [w]) == [True]


def test_a_parameter_frozen_after_the_forward_pass_is_left_out():
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)
    loss = second(first(torch.ones(2, 3))).sum()
    first.requires_grad_(False)
    assert shared_by([loss], [*second.parameters()]) == [False, False]


def test_a_leaf_whose_gradient_two_nodes_accumulate_is_one_leaf():
    """torch makes a new node for a parameter whose dtype was changed."""
    p = nn.Parameter(torch.ones(3))
    before = p.sum()
    p.data = p.data.double()
    after = p.sum()
    assert before.grad_fn.next_functions[0][0] is not after.grad_fn.next_functions[0][0]
    assert shared_by([before, after], [p]) == [True]
    assert reached_by([before, after], [p]).met_by == [0]


def test_custom_functions_views_and_writes_in_place():
    w, bias = leaf(), leaf()
    h = Twice.apply(w) * 1
    h[:2].mul_(bias[:2])
    early = h.sum()
    h += 1
    assert shared_by([early, Two.apply(h)[1].sum()], [w, bias]) == [True, True]


def test_a_non_reentrant_checkpoint_hides_nothing():
    trunk, head = nn.Linear(3, 3), nn.Linear(3, 1)
    h = checkpoint(trunk, torch.ones(2, 3), use_reentrant=False)
    losses = [h.sum(), head(h).sum()]
    assert shared_by(losses, [*trunk.parameters(), *head.parameters()]) == [True, True, False, False]
    assert reached_by(losses).hiding is None


def test_what_hides_parameters_is_said():
    x = torch.ones(2, 3, requires_grad=True)
    inside = checkpoint(nn.Linear(3, 1), x, use_reentrant=True).sum()
    assert "use_reentrant=True" in (reached_by([x.sum(), inside]).hiding or "")
    assert reached_by([x.sum()]).hiding is None


def test_a_changed_model_is_walked_anew():
    trunk, old, new = nn.Linear(3, 3), nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    h = trunk(torch.ones(2, 3))
    known = [*trunk.parameters(), old.weight, new.weight]
    assert shared_by([old(h).sum(), h.sum()], known) == [True, True, False, None]
    assert shared_by([new(h).sum(), old(h.detach()).sum()], known) == [False, False, False, False]


# Where the walk stops.


def test_leaves_beside_and_behind_the_features():
    w, head, beside = leaf(), leaf(), leaf()
    h = w.sin()
    losses = [(h * head).sum(), (h.exp() * head * beside).sum()]
    assert shared_by(losses, [w, head, beside], (h,)) == [None, True, False]
    assert shared_by([h], [w, head, beside]) == [False, None, None]
    assert reached_by(losses, (h,)).met_by == [0]
    assert shared_by([losses[0], w.sum()], [w, head], (h,)) == [False, False]  # w is beside the features too


@pytest.mark.parametrize("outputs", [lambda x: x.unbind(), lambda x: x.split(1), Two.apply])
def test_one_output_of_a_function_may_be_a_stop_and_another_not(outputs):
    w = leaf()
    first, second = outputs(w.sin())[:2]
    assert shared_by([first.sum()], [w], (first,)) == [None]
    assert shared_by([second.sum()], [w], (first,)) == [False]
    found = reached_by([second.sum(), first.sum()], (first, second, first))
    assert (found.leaves, found.met_by, found.met) == ([], [1, 0, 1], [True, True, True])
    assert reached_by([second.sum()], (first,)).met == [False]


def test_the_outputs_of_a_recurrent_module():
    lstm = nn.LSTM(3, 4)
    output, (hidden, cell) = lstm(torch.ones(5, 2, 3))
    found = reached_by([output.sum(), hidden.sum()], (output, hidden, cell))
    assert (found.leaves, found.met_by) == ([], [0, 1, None])
    assert shared_by([cell.sum()], [*lstm.parameters()], (output,)) == [False] * 4


def test_a_loss_or_a_leaf_may_be_a_stop():
    w, own = leaf(), leaf()
    loss = w.sum()
    assert shared_by([loss, (w * own).sum()], [w, own], (loss,)) == [False, False]
    assert shared_by([loss, (w * own).sum()], [w, own], (w,)) == [None, False]
    scalar = torch.ones((), requires_grad=True)
    assert reached_by([scalar], (scalar, w)).met_by == [0, None]


def test_a_stop_hides_another_one_behind_it():
    w = leaf()
    low = w.sin()
    high = low.cos()
    assert reached_by([high.sum()], (low, high)).met == [False, True]
    assert reached_by([high.sum(), low.sum()], (low, high)).met_by == [1, 0]


def test_a_stop_that_requires_no_grad_is_not_met():
    w, frozen = leaf(), leaf()
    loss = (w * frozen).sum()
    frozen.requires_grad_(False)
    assert reached_by([loss], (frozen, torch.ones(3))).met == [False, False]


# Features that depend on each other.


def test_independent_features():
    w = leaf()
    h = w.sin()
    first, second = h.unbind()[:2]
    assert dependent([first, second, h.cos(), leaf(), Two.apply(h)[0]]) is None
    assert dependent([]) is None
    assert dependent([w]) is None


def test_features_computed_from_features():
    w = leaf()
    h = w.sin()
    first, second = Two.apply(h)
    assert dependent([h.cos(), h]) == (0, 1)
    assert dependent([h, leaf(), second.exp()]) == (2, 0)
    assert dependent([h.sin(), w]) == (0, 1)
    assert dependent([first, second.exp()]) is None
    assert dependent([first, second.exp(), second]) == (1, 2)


def test_the_same_feature_twice():
    w = leaf()
    h = w.sin()
    assert dependent([w, leaf(), w]) == (2, 0)
    assert dependent([leaf(), h, h]) == (2, 1)
    assert dependent([h, h.detach().requires_grad_()]) is None


# Whole graphs, beside what torch.autograd.grad says.


def random_program(seed: int, cut: frozenset[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Leaves, losses, features, and what the functions that take a feature were given.

    Those are the features themselves, or copies without a graph for the ones in `cut`.
    """
    choose = random.Random(seed)
    leaves = [leaf() for _ in range(4)]
    values, given = [*leaves], [*leaves]
    for _ in range(14):
        a, b = choose.choice(given), choose.choice(given[-4:])
        results = choose.choice(
            [lambda a, b: [a * b], lambda a, b: [a + a], lambda a, b: Two.apply(b), lambda a, b: torch.stack([a, b])]
        )(a, b)
        for result in results if isinstance(results, list | tuple) else results.unbind():
            given.append(result.detach().requires_grad_() if len(values) in cut else result)
            values.append(result)
    losses = [choose.choice(given[4:]).sum() for _ in range(3)]
    return leaves, losses, values, given


@pytest.mark.parametrize("seed", range(25))
def test_random_graphs(seed):
    leaves, losses, values, _ = random_program(seed, frozenset())
    cut = frozenset(random.Random(seed).sample(range(4, len(values)), 4))
    features = [values[i] for i in sorted(cut)]

    rows = [torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in losses]
    counts = [sum(row[i] is not None for row in rows) for i in range(4)]
    assert shared_by(losses, leaves) == [None if count == 0 else count > 1 for count in counts]

    cut_leaves, cut_losses, _, given = random_program(seed, cut)
    inputs = [*cut_leaves, *(given[i] for i in sorted(cut))]
    rows = [torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True) for loss in cut_losses]
    counts = [sum(row[i] is not None for row in rows) for i in range(8)]
    assert shared_by(losses, leaves, tuple(features)) == [None if count == 0 else count > 1 for count in counts[:4]]
    first = [next((k for k, row in enumerate(rows) if row[i] is not None), None) for i in range(4, 8)]
    assert reached_by(losses, features).met_by == first

    pairs = {
        (i, j)
        for i, high in enumerate(features)
        for j, low in enumerate(features)
        if i != j and torch.autograd.grad(high.sum(), low, retain_graph=True, allow_unused=True)[0] is not None
    }
    pair = dependent(features)
    assert pair in pairs if pairs else pair is None


@pytest.mark.native
@pytest.mark.parametrize("seed", range(5))
def test_both_walks_give_the_same_in_the_same_order(seed, monkeypatch):
    _, losses, values, _ = random_program(seed, frozenset())
    native = [reached_by(losses), reached_by(losses, values[6:9])]
    monkeypatch.setattr(_native, "module", lambda: None)
    python = [reached_by(losses), reached_by(losses, values[6:9])]
    for ours, twin in zip(native, python, strict=True):
        assert [id(one) for one in ours.leaves] == [id(one) for one in twin.leaves]
        assert (ours.by_several, ours.met_by) == (twin.by_several, twin.met_by)
        assert list(ours.functions.items()) == list(twin.functions.items())


# What the walk costs.


def deep(depth: int) -> tuple[Tensor, Tensor]:
    w = leaf()
    total = w
    for _ in range(depth):
        total = total + w
    return w, total


def test_a_deep_graph(walk):
    # torch frees nodes that Python code has looked at by recursion, and crashes if they are as many as 50,000.
    w, total = deep(100_000 if walk == "native" else 20_000)
    assert shared_by([total.sum(), total.exp().sum()], [w]) == [True]
    assert dependent([total, w]) == (0, 1)


@pytest.mark.parametrize("walk", ["python"], indirect=True)
def test_a_thousand_losses_visit_a_node_twice_at_most(monkeypatch):
    visits: Counter[int] = Counter()
    next_edges = _graph._next_edges

    def counted(node):
        visits[id(node)] += 1
        return next_edges(node)

    monkeypatch.setattr(_graph, "_next_edges", counted)
    w, total = deep(100)
    head = leaf()
    losses = [(total * head * k).sum() for k in range(1000)]
    assert shared_by(losses, [w, head]) == [True, True]
    assert max(visits.values()) == 2
    assert sum(visits.values()) == 2 * 100 + 3 * 1000 + 0


def test_no_node_outlives_the_walk():
    w = leaf()
    h = Twice.apply(w)
    kept = weakref.ref(h.grad_fn.kept)
    loss = h.sum()
    found = reached_by([loss], (h.sin(),)), reached_by([h.sum(), loss], (w,)), dependent([h, loss])
    del h, loss
    gc.collect()
    assert kept() is None
    assert Twice._backward_cls in found[0].functions


def test_threads_walk_at_the_same_time():
    w, total = deep(2000)
    losses = [Twice.apply(total).sum(), total.sum()]

    def one(number: int) -> list[bool | None]:
        own, mine = deep(number)
        return shared_by([*losses, (mine * total).sum()], [w, own]) + shared_by([mine.sum()], [own], (total,))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(1, 40))) == [[True, False, False]] * 39
