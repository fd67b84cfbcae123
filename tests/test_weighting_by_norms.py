"""Loss weightings that read the norms of the task gradients, in every way to compute these."""

import pytest
import torch
import ways
from elementwise import METHODS
from torch import nn

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import MGDA, GramAggregator, PCGrad, Sum, UPGrad
from mtlfast.weighting._base import Weighted

K = 3


class ByNorm(Weighted):
    """Weights inverse to the norms times the tasks' losses. It counts its committed steps."""

    reads_norms = True

    def __init__(self, layers=None, order=2):
        super().__init__()
        self.layers, self.norm_order = layers, order
        self._keep_count("steps")

    def weights(self, values, tasks):
        assert self._norms.dtype == torch.float64
        self._move(self.steps, None, self.steps + 1)
        return values / self._norms


def net(dtype=torch.float64):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh()).to(dtype)
    heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(K)).to(dtype)
    return trunk, heads, torch.randn(8, 4, dtype=dtype)


def expected(trunk, heads, x, aggregator, layers=None, order=2):
    """The loss weights, and `.grad` of trunk and heads, one autograd pass after the other."""
    shared = list(trunk.parameters())
    losses = [(head(trunk(x)) - k).square().mean() for k, head in enumerate(heads)]
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    counted = shared if layers is None else layers
    at = [i for i, p in enumerate(shared) if any(p is layer for layer in counted)]
    norms = [torch.cat([row[i].reshape(-1) for i in at]).norm(order).item() for row in rows]
    weights = [loss.item() / norm for loss, norm in zip(losses, norms, strict=True)]
    weighted = [tuple(w * g for g in row) for w, row in zip(weights, rows, strict=True)]
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    heads_own = torch.autograd.grad(total, list(heads.parameters()))
    with torch.no_grad():
        grads = TaskGradients.from_rows(weighted, shared)
    return torch.tensor(weights, dtype=torch.float64), [*aggregator(grads), *heads_own]


@pytest.mark.parametrize("way", [way for way in ways.WAYS if way != "at"])
@pytest.mark.parametrize("method", [UPGrad, MGDA, Sum, METHODS["Agreeing"].make])
def test_every_way_weighs_by_the_norms_of_its_gradients(way, method):
    trunk, heads, x = net()
    weights, gradients = expected(trunk, heads, x, method())
    weighting = ByNorm()
    step = ways.step(way, trunk, heads, x, method(), weighting=weighting)
    torch.testing.assert_close(step.loss_weights.double(), weights)
    for parameter, gradient in zip([*trunk.parameters(), *heads.parameters()], gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert weighting.steps == 1
    if isinstance(method(), GramAggregator):
        weighted_gram = mtlfast.backward(
            [
                loss * w
                for loss, w in zip(
                    [(h(trunk(x)) - k).square().mean() for k, h in enumerate(heads)], weights, strict=True
                )
            ],
            method(),
            shared=trunk,
            diagnostics=True,
        ).gram
        again = ways.step(way, *net(), method(), weighting=ByNorm(), diagnostics=True)
        torch.testing.assert_close(again.gram, weighted_gram)


def test_norms_of_features_weigh_where_surgery_is_at_the_features():
    trunk, heads, x = net()
    features = trunk(x)
    losses = [(head(features) - k).square().mean() for k, head in enumerate(heads)]
    norms = [torch.autograd.grad(loss, features, retain_graph=True)[0].norm().item() for loss in losses]
    weights = [loss.item() / norm for loss, norm in zip(losses, norms, strict=True)]
    everything = [*trunk.parameters(), *heads.parameters()]
    gradients = torch.autograd.grad(
        sum(w * x for w, x in zip(weights, losses, strict=True)), everything, retain_graph=True
    )
    step = mtlfast.backward(losses, Sum(), at=features, weighting=ByNorm())
    torch.testing.assert_close(step.loss_weights.tolist(), weights)
    for parameter, gradient in zip(everything, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("layers", ["last", "some", None])
def test_norms_of_some_layers_and_of_either_order(order, layers):
    trunk, heads, x = net()
    some = {"last": list(trunk[2].parameters()), "some": [trunk[0].bias, trunk[2].weight], None: None}[layers]
    weights, gradients = expected(trunk, heads, x, PCGrad().eval(), some, order)
    step = ways.step("losses", trunk, heads, x, PCGrad(order="fixed"), weighting=ByNorm(some, order))
    torch.testing.assert_close(step.loss_weights.double(), weights)
    for parameter, gradient in zip([*trunk.parameters(), *heads.parameters()], gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_norms_do_not_see_the_loss_scale():
    trunk, heads, x = net()
    plain = ways.step("losses", trunk, heads, x, Sum(), weighting=ByNorm())
    losses = [1024 * (head(trunk(x)) - k).square().mean() for k, head in enumerate(heads)]
    scaled = mtlfast.backward(losses, Sum(), shared=trunk, weighting=ByNorm(), loss_scale=1024.0)
    torch.testing.assert_close(scaled.loss_weights, plain.loss_weights)


def test_a_layer_that_is_not_shared_is_refused_before_the_passes():
    trunk, heads, x = net()
    for layers, message in [
        ([heads[0].weight], r"ByNorm: layer 0, of shape \[1, 6\], is not in shared, expected shared parameters alone"),
        ([trunk[0].weight, torch.zeros(3, requires_grad=True)], r"ByNorm: layer 1, of shape \[3\], is not"),
    ]:
        weighting = ByNorm(layers)
        with pytest.raises(ValueError, match=message):
            ways.step("losses", trunk, heads, x, Sum(), weighting=weighting)
        assert weighting.steps == 0
    assert all(p.grad is None for p in [*trunk.parameters(), *heads.parameters()])


def test_weights_by_norms_rewrite_no_gradients(monkeypatch):
    def fail(*arguments):
        raise AssertionError("the rows are read where they lie")

    monkeypatch.setattr(ops, "scale_", fail)
    ways.step("losses", *net(), UPGrad(), weighting=ByNorm())
    ways.step("closures", *net(), UPGrad(), weighting=ByNorm())


def test_a_task_of_weight_zero_is_absent():
    class WithoutSecond(ByNorm):
        def weights(self, values, tasks):
            return super().weights(values, tasks) * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)

    trunk, heads, x = net()
    step = ways.step("losses", trunk, heads, x, UPGrad(), weighting=WithoutSecond(), diagnostics=True)
    assert step.weights[1] == 0
    assert heads[1].weight.grad is None
    assert torch.equal(step.gram[1], torch.zeros(K, dtype=torch.float64))


def test_norms_of_order_one_and_bad_orders():
    grads = TaskGradients.from_rows([[torch.tensor([3.0, -4.0]), None], [None, torch.tensor([[-2.0]])]])
    assert ops.norms(grads, order=1).tolist() == [7, 2]
    assert mtlfast.reference.norms(grads, order=1).tolist() == [7, 2]
    assert ops.norms(grads).tolist() == [5, 2]
    with pytest.raises(ValueError, match="norms: order is 3, expected 1 or 2"):
        ops.norms(grads, order=3)


def test_frozen_layers_are_passed_over_and_features_have_no_layers():
    trunk, heads, x = net()
    trunk[2].weight.requires_grad_(False)
    layers = list(trunk[2].parameters())
    step = ways.step("losses", trunk, heads, x, Sum(), weighting=ByNorm(layers))
    (row,) = torch.autograd.grad((heads[0](trunk(x)) - 0).square().mean(), [trunk[2].bias])
    torch.testing.assert_close(step.loss_weights[0].double(), step.losses[0] / row.norm())
    trunk[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="ByNorm: none of the layers requires grad, expected at least one"):
        ways.step("losses", trunk, heads, x, Sum(), weighting=ByNorm(layers))
    with pytest.raises(ValueError, match="ByNorm: layers are parameters, expected layers=None as the gradients are"):
        ways.step("at", trunk, heads, x, Sum(), weighting=ByNorm([trunk[0].weight]))
