"""float32 and bfloat16 by the implicit way: errors beside a float64 run, where terms cancel and where tasks depend."""

import copy

import pytest
import torch
from implicit_steps import Tasks, error_of, mlp, step
from implicit_trunks import TRUNKS
from torch import nn

from mtlfast.aggregation import PCGrad, UPGrad
from mtlfast.jacobian import _plan
from mtlfast.jacobian._products import CANCELLED

pytestmark = pytest.mark.native

BOUND = 5e-6


def errors(model, x, aggregator=None):
    """The errors of the stored and of the implicit way's G beside a float64 run of the model."""
    exact = copy.deepcopy(model).double()
    reference, _ = step(lambda: exact.losses(x.double()), exact, "stored", aggregator, exact.trunk)
    found = []
    for way in ("stored", "implicit"):
        result, _ = step(lambda: model.losses(x), model, way, aggregator, model.trunk)
        found.append(error_of(result.gram, reference.gram))
    return found


def chosen(model):
    """The only plan of a model's trunk."""
    (plan,) = _plan._cache[next(model.trunk.parameters())].values()
    return plan


@pytest.mark.parametrize("name", TRUNKS)
def test_the_error_of_ordinary_models(name):
    model, x = Tasks(TRUNKS[name](), 32, 4), torch.randn(2, 4, 32)
    stored, implicit = errors(model, x)
    assert implicit <= max(BOUND, 2 * stored)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e17])
def test_the_error_of_small_and_large_losses(scale):
    class Scaled(Tasks):
        def losses(self, x):
            return [scale * loss for loss in super().losses(x)]

    stored, implicit = errors(Scaled(mlp(32, 2), 32, 4), torch.randn(4, 32))
    assert implicit <= max(BOUND, 2 * stored)


class Cancelling(nn.Module):
    """A layer whose rows cancel: to similar inputs come opposite gradients at the outputs.

    Args:
        rows: N, even.
        width: of the input and of the output.
        share: of the variance of inputs and gradients that does not cancel.
    """

    def __init__(self, rows, width, share):
        super().__init__()
        self.trunk = nn.Linear(width, width, bias=False)
        self.x = nn.Buffer(torch.randn(1, width) + share**0.5 * torch.randn(rows, width))
        sign = torch.tensor([1.0, -1.0]).repeat(rows // 2)[:, None]
        noise = share**0.5 * torch.randn(3, rows, width)
        self.deltas = nn.Buffer(sign * torch.randn(3, 1, width) + noise)

    def losses(self, x):
        y = self.trunk(x)
        return [(delta * y).sum() for delta in self.deltas]

    def rho(self):
        """The smallest G_kk as a share of the sum of |x_n|^2 |d_n|^2."""
        x, deltas = self.x.double(), self.deltas.double()
        squares = [(delta.T @ x).square().sum() for delta in deltas]
        sums = [(x.square().sum(1) * delta.square().sum(1)).sum() for delta in deltas]
        return min(float(a / b) for a, b in zip(squares, sums, strict=True))


@pytest.mark.whole
@pytest.mark.parametrize("share", [0.4, 0.05, 0.025, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("rows", "width"), [(8, 32), (32, 128)])
def test_the_error_where_terms_cancel(rows, width, share):
    for seed in range(3):
        torch.manual_seed(seed)
        model = Cancelling(rows, width, share)
        stored, implicit = errors(model, model.x)
        assert implicit <= max(BOUND, 2 * stored), (seed, model.rho())
        found, rho = chosen(model), model.rho()
        assert found.columns == {0}
        if rho < 0.9 * CANCELLED:
            assert found.wide.columns == {0}
        if rho > 1.1 * CANCELLED:
            assert not found.wide.columns


def test_only_the_layer_where_terms_cancel_moves_to_float64_and_stays():
    class Two(Tasks):
        def losses(self, x):
            first, second = self.trunk
            y = torch.cat([first(x), -first(x + 1e-3 * torch.randn_like(x))]) + 1e-3 * first(x).repeat(2, 1)
            return [y.sum(0) @ second(x)[k] for k in range(3)]

    model = Two(nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)]), 64, 3)
    for _ in range(2):
        step(lambda: model.losses(torch.randn(4, 64)), model, "implicit", shared=model.trunk)
    assert chosen(model).columns == {0, 1}
    assert chosen(model).wide.columns == {0}


class Near(nn.Module):
    """Three tasks, the last of which nearly depends on the others.

    Attributes:
        apart: how far, relative to their gradients' length.
    """

    def __init__(self, width=64, rows=4):
        super().__init__()
        self.trunk, self.apart = mlp(width, 2, bias=False), 1.0
        self.deltas = nn.Buffer(torch.randn(3, rows, width))

    def losses(self, x):
        y = self.trunk(x)
        first, second, own = (self.deltas * y).sum((1, 2))
        return [first, second, -0.7 * first - 0.8 * second + self.apart * own]


def weights_of(model, x, aggregator):
    exact = copy.deepcopy(model).double()
    reference, _ = step(lambda: exact.losses(x.double()), exact, "stored", aggregator(), exact.trunk)
    return reference.weights, *(
        step(lambda: model.losses(x), model, way, aggregator(), model.trunk)[0].weights
        for way in ("stored", "implicit")
    )


def test_tasks_that_nearly_depend_on_each_other_get_float64_products_until_they_do_not():
    model, x = Near(), torch.randn(4, 64)
    for apart in (1.0, 1e-2, 3e-3, 1.0, 1e-2, 1e-2, 1.0):
        model.apart = apart
        exact, stored, implicit = weights_of(model, x, UPGrad)
        off = float((implicit - exact).abs().max())
        assert off <= max(2 * float((stored - exact).abs().max()), 1e-4 * float(exact.abs().max())), apart
        assert chosen(model).wide.everything == (apart < 1), apart


def test_a_method_that_decides_nothing_about_ranks_does_not_pay_for_it():
    model, x = Near(), torch.randn(4, 64)
    model.apart = 1e-3
    step(lambda: model.losses(x), model, "implicit", PCGrad(), model.trunk, diagnostics=False)
    assert not chosen(model).wide.everything


WIDE = {
    "MLP": lambda: mlp(256, 3),
    "encoder layer": lambda: nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True),
}


@pytest.mark.parametrize("name", WIDE)
def test_bfloat16_under_autocast(name):
    """The stored way rounds each element of the weights' gradients to bfloat16, which few elements show more."""
    model, x = Tasks(WIDE[name](), 256, 4), torch.randn(1, 32, 256)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return [loss.float() for loss in model.losses(x)]

    (stored, expected), (implicit, got) = (
        step(losses, model, way, shared=model.trunk) for way in ("stored", "implicit")
    )
    assert any(layer.way == "implicit" for layer in implicit.plan.layers)
    off = sum(float((a - b).square().sum()) for a, b in zip(got, expected, strict=True)) ** 0.5
    norm = sum(float(b.square().sum()) for b in expected) ** 0.5
    assert error_of(implicit.gram, stored.gram) <= 7e-5
    assert off <= 2e-3 * norm
