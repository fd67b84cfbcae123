"""Groups of shared parameters: each gets the weights that surgery on it alone would give."""

import copy

import pytest
import torch
import ways
from cases import draw_rows
from grouped import Block, K, losses_of, net
from methods import METHODS
from torch import nn

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import CRMOGM, MGDA, PCD, GradVac, MoDo, NashMTL, PCGrad, Sum, UPGrad
from mtlfast.ops.solve import MOST_TASKS
from mtlfast.weighting import Constant

GRAM_METHODS = [name for name, row in METHODS.items() if not row.cross and row.least_tasks <= K <= row.most_tasks]


def rows_of(trunk, heads, x):
    losses = losses_of(trunk, heads, x)
    return [torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True) for loss in losses]


# How the groups are given, and the name of each parameter's group: first (2), blocks.0 (its own, then inner's 2), ...
FORMS = {
    "tensor": (
        lambda trunk: "tensor",
        ["first.weight", "first.bias"]
        + [f"blocks.{i}.{name}" for i in range(2) for name in ("scale", "inner.weight", "inner.bias")],
    ),
    "module": (
        lambda trunk: "module",
        ["first"] * 2 + ["blocks.0"] + ["blocks.0.inner"] * 2 + ["blocks.1"] + ["blocks.1.inner"] * 2,
    ),
    "depth 1": (lambda trunk: 1, ["first"] * 2 + ["blocks"] * 6),
    "depth 2": (lambda trunk: 2, ["first"] * 2 + ["blocks.0"] * 3 + ["blocks.1"] * 3),
    "names": (lambda trunk: ["blocks.0", "first", "blocks.1"], ["first"] * 2 + ["blocks.0"] * 3 + ["blocks.1"] * 3),
    "classes": (
        lambda trunk: [nn.Linear, "blocks.0.scale", "blocks.1.scale"],
        ["first"] * 2 + ["blocks.0.scale"] + ["blocks.0.inner"] * 2 + ["blocks.1.scale"] + ["blocks.1.inner"] * 2,
    ),
    "an outer class": (lambda trunk: [Block, "first"], ["first"] * 2 + ["blocks.0"] * 3 + ["blocks.1"] * 3),
    "optimizer": (
        lambda trunk: torch.optim.SGD([{"params": trunk.first.parameters()}, {"params": trunk.blocks.parameters()}]),
        ["group 0"] * 2 + ["group 1"] * 6,
    ),
    "dict": (
        lambda trunk: {"a": trunk.first, "b": ["blocks.0", *trunk.blocks[1].parameters()]},
        ["a"] * 2 + ["b"] * 6,
    ),
    "function": (
        lambda trunk: lambda name: name[-4:],
        ["ight", "bias", "cale", "ight", "bias", "cale", "ight", "bias"],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_group_has_the_weights_of_surgery_on_it_alone(form):
    trunk, heads, x = net()
    make, names = FORMS[form]
    step = mtlfast.backward(losses_of(trunk, heads, x), UPGrad(), shared=trunk, groups=make(trunk), diagnostics=True)
    rows, parameters = rows_of(trunk, heads, x), list(trunk.parameters())
    assert step.groups == tuple(dict.fromkeys(names))
    assert step.weights.shape == (len(step.groups), K)
    for name, result in step.by_group.items():
        places = [t for t, its in enumerate(names) if its == name]
        some = TaskGradients.from_rows([[row[t] for t in places] for row in rows])
        torch.testing.assert_close(result.gram, ops.gram(some))
        torch.testing.assert_close(result.weights, UPGrad().weights(ops.gram(some), rtol=1e-12))
        torch.testing.assert_close(result.cosines.diagonal(), torch.ones(K, dtype=torch.float64))
        for t, direction in zip(places, UPGrad()(some), strict=True):
            torch.testing.assert_close(parameters[t].grad, direction)
    for k, head in enumerate(heads):
        (own,) = torch.autograd.grad(losses_of(trunk, heads, x)[k], [head.weight])
        torch.testing.assert_close(head.weight.grad, own)


def expected(method, rows, names, **more):
    """The direction of each parameter, group by group."""
    directions = [None] * len(names)
    for group in dict.fromkeys(names):
        places = [t for t, its in enumerate(names) if its == group]
        some = TaskGradients.from_rows([[row[t] for t in places] for row in rows])
        for t, direction in zip(places, method()(some, **more), strict=True):
            directions[t] = direction
    return directions


@pytest.mark.parametrize("way", [way for way in ways.WAYS if way != "at"])
@pytest.mark.parametrize("method", [MGDA, lambda: PCGrad(order="fixed"), NashMTL])
def test_groups_in_every_way(way, method):
    trunk, heads, x = net()
    rows = rows_of(trunk, heads, x)
    wanted = expected(method, rows, [str(t) for t in range(8)])
    step = ways.step(way, trunk, heads, x, method(), groups="tensor")
    assert step.weights.shape == (8, K)
    for parameter, direction in zip(trunk.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, direction)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_every_gram_method_takes_groups(name):
    rows = draw_rows(3, [(4,), (2, 3), (5,), (7,)], dtype=torch.float64)
    rows[1][2] = None
    grads = TaskGradients.from_rows(rows)
    groups = ["a", "b", "a", "b"]
    losses = torch.rand(3, dtype=torch.float64) + 1
    method = METHODS[name].make().eval()
    directions = method(grads, losses=losses, groups=groups)
    wanted = expected(lambda: METHODS[name].make().eval(), rows, groups, losses=losses)
    for direction, its in zip(directions, wanted, strict=True):
        torch.testing.assert_close(direction, its, rtol=1e-8, atol=1e-10)


def test_a_task_that_reaches_nothing_of_a_group_is_absent_in_it():
    trunk, heads, x = net()
    features = trunk.first(x)
    losses = losses_of(trunk, heads, x)
    losses[1] = (heads[1](features) - 1).square().mean()
    step = mtlfast.backward(losses, MGDA(), shared=trunk, groups=1, diagnostics=True)
    by_group = step.by_group
    assert by_group["blocks"].weights[1] == 0
    torch.testing.assert_close(by_group["first"].weights.sum().item(), 1.0)
    rows = [
        torch.autograd.grad(loss, list(trunk.blocks.parameters()), retain_graph=True)
        for loss in losses_of(trunk, heads, x)
    ]
    two = TaskGradients.from_rows([rows[0], rows[2]])
    torch.testing.assert_close(by_group["blocks"].weights[[0, 2]], MGDA().weights(ops.gram(two), rtol=1e-12))


def test_a_group_that_no_task_reaches_is_left_alone():
    trunk, heads, x = net()
    losses = [(head(trunk.first(x)) - k).square().mean() for k, head in enumerate(heads)]
    step = mtlfast.backward(losses, UPGrad(), shared=trunk, groups=1)
    assert step.by_group["blocks"].weights.tolist() == [0] * K
    assert all(p.grad is None for p in trunk.blocks.parameters())
    torch.testing.assert_close(
        trunk.first.weight.grad,
        UPGrad()(
            TaskGradients.from_rows(
                [
                    torch.autograd.grad(loss, [trunk.first.weight, trunk.first.bias], retain_graph=True)
                    for loss in [(head(trunk.first(x)) - k).square().mean() for k, head in enumerate(heads)]
                ]
            )
        )[0],
    )


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_what_is_not_finite_in_one_group_leaves_the_others(name):
    methods, steps, gradients = [METHODS[name].make() for _ in range(2)], [], []
    for method, factors in zip(methods, ((1, 1), (1, torch.nan)), strict=True):
        for factor in factors:  # a step before, for the state
            trunk, heads, x = net()
            of_tasks = iter([1, factor, 1])
            trunk.blocks[0].scale.register_hook(lambda gradient, of_tasks=of_tasks: gradient * next(of_tasks))
            torch.manual_seed(0)
            losses = losses_of(trunk, heads, x)
            step = mtlfast.backward(losses, method, shared=trunk, groups="tensor", diagnostics=True)
        steps.append(step.by_group)
        gradients.append({name: parameter.grad for name, parameter in trunk.named_parameters()})
    for group, gradient in gradients[1].items():
        alignment = steps[1][group].alignment
        if group == "blocks.0.scale":
            assert gradient.isnan().all()
            assert alignment.isnan()
        else:
            assert torch.equal(gradient, gradients[0][group])
            assert torch.equal(alignment, steps[0][group].alignment)


@pytest.mark.parametrize("method", [PCD, lambda: GradVac(order="fixed"), lambda: CRMOGM(MGDA()), NashMTL])
def test_state_belongs_to_the_groups_by_name(method):
    """Another order of the groups, through a state dict, gives what an uninterrupted run does."""
    trunk, heads, x = net()
    straight, first, then = method(), method(), method()
    for step in range(3):
        for which in (straight, first):
            for parameter in trunk.parameters():
                parameter.grad = None
            mtlfast.backward(losses_of(trunk, heads, x + step), which, shared=trunk, groups=1)
    then.load_state_dict(first.state_dict())
    turned = dict(reversed(list(trunk.named_parameters())))
    results = [
        mtlfast.backward(losses_of(trunk, heads, x), which, shared=shared, groups=1)
        for which, shared in ((straight, trunk), (then, turned))
    ]
    assert results[0].groups == results[1].groups[::-1]
    for name, result in results[0].by_group.items():
        torch.testing.assert_close(result.weights, results[1].by_group[name].weights, rtol=1e-10, atol=1e-12)


def test_groups_that_changed_are_refused_before_any_pass():
    trunk, heads, x = net()
    method = PCD()
    mtlfast.backward(losses_of(trunk, heads, x), method, shared=trunk, groups=1)
    before = method.state.clone()
    for groups, message in [
        ("tensor", "PCD: got a group blocks.0.inner.bias, expected those as the state has"),
        (lambda name: "blocks", "PCD: got no group first, expected those as the state has"),
        (None, r"PCD: got no groups, expected groups as the state has \(reset\(\) forgets it\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            mtlfast.backward(losses_of(trunk, heads, x), method, shared=trunk, groups=groups)
    assert torch.equal(method.state, before)
    method.reset()
    mtlfast.backward(losses_of(trunk, heads, x), method, shared=trunk, groups="tensor")
    copied = copy.deepcopy(method)
    assert torch.equal(copied.state, method.state)


def test_a_failed_step_brings_back_the_order_of_the_groups(monkeypatch):
    trunk, heads, x = net()
    method = PCD()
    mtlfast.backward(losses_of(trunk, heads, x), method, shared=trunk, groups=1)
    before = method.state.clone(), method.state_groups.clone()
    trunk.first.weight.grad = torch.ones((), dtype=torch.float64).expand(6, 4)  # cannot be added to
    turned = dict(reversed(list(trunk.named_parameters())))
    with pytest.raises(RuntimeError, match="expanded"):
        mtlfast.backward(losses_of(trunk, heads, x), method, shared=turned, groups=1)
    assert torch.equal(method.state, before[0])
    assert torch.equal(method.state_groups, before[1])


def test_two_batches_in_groups():
    trunk, heads, x = net()
    step = mtlfast.backward(
        losses_of(trunk, heads, x),
        MoDo(),
        shared=trunk,
        second=losses_of(trunk, heads, x + 1),
        groups=1,
        diagnostics=True,
    )
    a, b = rows_of(trunk, heads, x), rows_of(trunk, heads, x + 1)
    for group, places in (("first", [0, 1]), ("blocks", range(2, 8))):
        one, other = (torch.stack([torch.cat([row[t].reshape(-1) for t in places]) for row in rows]) for rows in (a, b))
        weights = MoDo().weights(one @ other.T)
        torch.testing.assert_close(step.by_group[group].weights, weights)
        mean = (one + other) / 2
        torch.testing.assert_close(step.by_group[group].gram, mean @ mean.T)
        written = torch.cat([list(trunk.parameters())[t].grad.reshape(-1) for t in places])
        torch.testing.assert_close(written, weights @ mean)


def test_loss_weights_stay_global():
    trunk, heads, x = net()
    weights = [2.0, 0.5, 1.0]
    step = mtlfast.backward(
        losses_of(trunk, heads, x), MGDA(), shared=trunk, weighting=Constant(weights), groups="tensor"
    )
    assert step.loss_weights.tolist() == weights
    rows = [[w * g for g in row] for w, row in zip(weights, rows_of(trunk, heads, x), strict=True)]
    for parameter, wanted in zip(trunk.parameters(), expected(MGDA, rows, [str(t) for t in range(8)]), strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


@pytest.mark.native
@pytest.mark.parametrize("groups", ["tensor", 1, None])
@pytest.mark.parametrize("name", GRAM_METHODS)
def test_a_step_with_diagnostics_reads_no_value_on_the_host(name, groups, monkeypatch):
    """Tensors on meta have no values: an operation that reads one raises."""
    monkeypatch.setitem(MOST_TASKS, "meta", 512)  # as on a GPU, where the solver is one op
    trunk, heads, x = (given.to("meta") for given in net())
    method = METHODS[name].make().to("meta")
    for _ in range(2):  # without state, and with it
        step = mtlfast.backward(losses_of(trunk, heads, x), method, shared=trunk, groups=groups, diagnostics=True)
        for result in (step, *step.by_group.values()):
            for found in (result.weights, result.gram, result.norms, result.cosines, result.alignment):
                assert found.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        step.alignment.tolist()


def test_alignment():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for losses, alignment in [
        ([w[0], 3 * w[0]], 1),
        ([w[0], -w[0]], -1),
        ([w[0], w[1]], 0),
        ([w[0], 3 * w[0], 0 * w[0]], 1),
    ]:
        step = mtlfast.backward(losses, Sum(), shared=[w], diagnostics=True)
        assert step.alignment.item() == pytest.approx(alignment)
    assert mtlfast.backward([w[0], w[1]], Sum(), shared=[w]).alignment is None
    assert mtlfast.backward([0 * w[0], 0 * w[1]], Sum(), shared=[w], diagnostics=True).alignment.isnan()
    both = mtlfast.backward([w[0], torch.nan * w[1]], Sum(), shared=[w], diagnostics=True)
    assert both.alignment.isnan()
