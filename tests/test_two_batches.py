"""MoDo and SDMGrad in training: `mtlfast.backward(losses, method, second=other_losses)`."""

import pytest
import torch
from torch import nn

import mtlfast
from mtlfast.aggregation import CRMOGM, Compose, MoDo, NormBalance, PCGrad, SDMGrad
from mtlfast.weighting import DWA, Constant

K = 3
METHODS = [MoDo, SDMGrad, lambda: CRMOGM(MoDo())]


class Net(nn.Module):
    """A trunk and K heads; head 1 has a parameter that no other task reaches, and so have all."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh()).to(dtype)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(K)).to(dtype)
        self.batches = torch.randn(2, 8, 4, dtype=dtype)

    def losses(self, batch):
        features = self.trunk(self.batches[batch])
        return [(head(features) - k).square().mean() for k, head in enumerate(self.heads)]

    def closures(self, batch):
        x = self.batches[batch]
        return [lambda k=k: (self.heads[k](self.trunk(x)) - k).square().mean() for k in range(K)]


def jacobian(net, batch):
    rows = [torch.autograd.grad(loss, list(net.trunk.parameters()), retain_graph=True) for loss in net.losses(batch)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def expected(net, method, loss_weights=(1.0,) * K):
    """Weights, and `.grad` of trunk and heads."""
    scale = torch.tensor(loss_weights, dtype=torch.float64)
    first, second = (scale[:, None] * jacobian(net, batch) for batch in (0, 1))
    weights = method.weights(first @ second.T, losses=torch.ones(K))
    direction = weights @ ((first + second) / 2)
    mean = sum(w * (a + b) / 2 for w, a, b in zip(loss_weights, net.losses(0), net.losses(1), strict=True))
    return weights, direction, torch.autograd.grad(mean, list(net.heads.parameters()))


def compare(net, step, weights, direction, heads):
    torch.testing.assert_close(step.weights, weights)
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in net.trunk.parameters()]), direction)
    for parameter, gradient in zip(net.heads.parameters(), heads, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


FORMS = {
    "losses": lambda net: (net.losses(0), net.losses(1), {"shared": net.trunk}),
    "found": lambda net: (net.losses(0), net.losses(1), {}),
    "named": lambda net: (
        dict(zip("abc", net.losses(0), strict=True)),
        dict(zip("abc", net.losses(1), strict=True)),
        {"shared": net.trunk},
    ),
    "closures": lambda net: (net.closures(0), net.closures(1), {"shared": net.trunk}),
    "features": lambda net: (net.losses(0), net.losses(1), {"features": net.trunk(net.batches[0])}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", METHODS, ids=["MoDo", "SDMGrad", "CRMOGM"])
def test_weights_of_the_products_are_applied_to_the_mean(make, form):
    net, method, twin = Net(), make(), make()
    losses, second, more = FORMS[form](net)
    if form == "features":
        features = more["features"]
        losses = [(head(features) - k).square().mean() for k, head in enumerate(net.heads)]
    step = mtlfast.backward(losses, method, second=second, **more)
    wanted = expected(net, twin)
    compare(net, step, *wanted)
    torch.testing.assert_close(
        step.losses, torch.stack([(a + b) / 2 for a, b in zip(net.losses(0), net.losses(1), strict=True)])
    )
    assert step.tasks == (0, 1, 2)
    assert step.plan.way == "two batches"
    for parameter in net.parameters():  # a second step goes on from the state of the first
        parameter.grad = None
    step = mtlfast.backward(net.losses(0), method, second=net.losses(1), shared=net.trunk)
    compare(net, step, *expected(net, twin))


def test_the_gram_matrix_for_diagnostics_is_that_of_the_mean():
    net = Net()
    mean = (jacobian(net, 0) + jacobian(net, 1)) / 2
    step = mtlfast.backward(net.losses(0), MoDo(), second=net.losses(1), shared=net.trunk, diagnostics=True)
    torch.testing.assert_close(step.gram, mean @ mean.T)


@pytest.mark.parametrize("form", ["losses", "closures"])
def test_loss_weights_multiply_both_batches(form):
    net, weights = Net(), (2.0, 0.5, 3.0)
    losses, second, more = FORMS[form](net)
    step = mtlfast.backward(losses, SDMGrad(), second=second, weighting=Constant(weights), **more)
    compare(net, step, *expected(net, SDMGrad(), weights))


def test_a_weighting_sees_the_mean_losses():
    net, weighting, twin = Net(), DWA(K), DWA(K)
    for _ in range(3):
        step = mtlfast.backward(net.losses(0), MoDo(), second=net.losses(1), shared=net.trunk, weighting=weighting)
    for _ in range(3):
        wanted = twin.step_weights(
            torch.stack([(a + b) / 2 for a, b in zip(net.losses(0), net.losses(1), strict=True)]).detach()
        )
        wanted.commit()
    torch.testing.assert_close(step.loss_weights, wanted.loss_weights)


def test_absent_tasks_are_absent_from_both_batches():
    net, first, second = Net(), Net().losses(0), Net().losses(1)
    first, second = net.losses(0), net.losses(1)
    first[1] = second[1] = None
    step = mtlfast.backward(first, MoDo(), second=second, shared=net.trunk)
    assert step.tasks == (0, 2)
    a, b = jacobian(net, 0)[[0, 2]], jacobian(net, 1)[[0, 2]]
    torch.testing.assert_close(step.weights, MoDo().weights(a @ b.T, tasks=[0, 2]))
    assert net.heads[1].weight.grad is None


def test_the_loss_scale_changes_no_weight_of_modo():
    net, scaled = Net(), Net()
    plain = mtlfast.backward(net.losses(0), MoDo(), second=net.losses(1), shared=net.trunk)
    first, second = ([1024 * loss for loss in scaled.losses(batch)] for batch in (0, 1))
    step = mtlfast.backward(first, MoDo(), second=second, shared=scaled.trunk, loss_scale=1024.0)
    assert torch.equal(step.weights, plain.weights)
    assert torch.equal(scaled.trunk[0].weight.grad, 1024 * net.trunk[0].weight.grad)


def test_a_step_that_is_not_finite_leaves_the_state():
    net, method = Net(), MoDo()
    mtlfast.backward(net.losses(0), method, second=net.losses(1), shared=net.trunk)
    before = method.state.clone()
    net.batches[1, 0, 0] = torch.inf
    mtlfast.backward([loss * torch.nan for loss in net.losses(0)], method, second=net.losses(0), shared=net.trunk)
    assert net.trunk[0].weight.grad.isnan().any()
    assert torch.equal(method.state, before)


def with_accumulator(net):
    accumulator = mtlfast.TaskGradientAccumulator(net.trunk)
    accumulator.add(net.losses(0))
    return accumulator


REFUSED = {
    "one batch": (lambda n: (n.losses(0), MoDo(), {}), TypeError, r"MoDo: got the gradients of one batch.*second="),
    "a method of one batch": (
        lambda n: (n.losses(0), PCGrad(), {"second": n.losses(1)}),
        TypeError,
        "PCGrad: got second=, expected the losses of one batch",
    ),
    "composed": (
        lambda n: (n.losses(0), Compose(NormBalance(), MoDo()), {"second": n.losses(1)}),
        TypeError,
        "NormBalance: got second=",
    ),
    "fewer tasks": (
        lambda n: (n.losses(0), MoDo(), {"second": n.losses(1)[:2]}),
        ValueError,
        r"second has tasks \[0, 1\] of 2, expected tasks \[0, 1, 2\] of 3 as losses",
    ),
    "another task absent": (
        lambda n: (n.losses(0), MoDo(), {"second": [None, *n.losses(1)[1:]]}),
        ValueError,
        r"second has tasks \[1, 2\] of 3, expected tasks \[0, 1, 2\] of 3",
    ),
    "other names": (
        lambda n: (
            dict(zip("abc", n.losses(0), strict=True)),
            MoDo(),
            {"second": dict(zip("acb", n.losses(1), strict=True))},
        ),
        ValueError,
        "second has the entries a, c, b, expected a, b, c as losses",
    ),
    "functions beside tensors": (
        lambda n: (n.losses(0), MoDo(), {"second": n.closures(1)}),
        TypeError,
        "the entries of second are functions, expected tensors as those of losses",
    ),
    "closures with nothing shared": (
        lambda n: (n.closures(0), MoDo(), {"second": n.closures(1), "shared": None}),
        ValueError,
        "shared is None, expected the shared parameters",
    ),
    "a second loss without a graph": (
        lambda n: (n.losses(0), MoDo(), {"second": [x.detach() for x in n.losses(1)]}),
        ValueError,
        "second loss 0 does not require grad",
    ),
    "at features": (
        lambda n: (n.losses(0), MoDo(), {"second": n.losses(1), "at": n.trunk(n.batches[0]), "shared": None}),
        ValueError,
        "got second= beside at=, expected shared= or features=",
    ),
    "an accumulator": (
        lambda n: (with_accumulator(n), MoDo(), {"second": n.losses(1), "shared": None}),
        ValueError,
        "got second= beside an accumulator",
    ),
    "an accumulator as second": (
        lambda n: (n.losses(0), MoDo(), {"second": with_accumulator(n)}),
        TypeError,
        "second is a TaskGradientAccumulator",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence_and_moves_nothing(what):
    make, error, message = REFUSED[what]
    net = Net()
    losses, method, more = make(net)
    with pytest.raises(error, match=message):
        mtlfast.backward(losses, method, **{"shared": net.trunk, **more})
    assert all(p.grad is None for p in net.parameters())
    assert getattr(method, "state", None) is None


@pytest.mark.parametrize("make", METHODS, ids=["MoDo", "SDMGrad", "CRMOGM"])
def test_training_lowers_both_losses(make):
    net, method = Net(), make()
    optimizer = mtlfast.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), method, shared=net.trunk)
    start = sum(net.losses(0)).item()
    for _ in range(30):
        optimizer.zero_grad()
        optimizer.backward(net.losses(0), second=net.losses(1))
        optimizer.step()
    assert sum(net.losses(0)).item() < 0.5 * start
