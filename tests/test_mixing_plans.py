"""What a plan of mixtures remembers: flags that change behind it, and when it is probed again."""

import functools

import pytest
import torch
from mixing_between import of_rows
from mixing_models import MIXINGS, D, Model, S, T
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import Constant, UPGrad
from mtlfast.jacobian import _probe
from mtlfast.jacobian._samples import samples_of

pytestmark = pytest.mark.native


def run(net: Model, way: str = "mixing", A: Tensor | None = None) -> mtlfast.StepResult:
    """A step of the model itself, so that its plan is kept."""
    A = torch.ones(3, S) if A is None else A
    return mtlfast.backward(net.losses(), UPGrad(), shared=dict(net.trunk.named_parameters()), mixing=A, jacobian=way)


@pytest.mark.parametrize("between", [nn.BatchNorm1d(D, affine=False), lambda x: Normalised.flag(x)])
def test_a_change_from_eval_to_train_behind_a_plan_is_noticed(between):
    net = of_rows(between)
    Normalised.training = False
    net.eval()
    for _ in range(3):
        run(net)
    net.train()
    Normalised.training = True
    with pytest.raises(ValueError, match="samples meet"):
        run(net)
    assert "samples meet" in run(net, "auto").plan.reason
    net.eval()
    Normalised.training = False
    assert run(net, "auto", torch.randn(8, S)).plan.way == "mixing"


class Normalised:
    """A normalisation by the batch's mean in training, and by nothing otherwise."""

    training = True

    @staticmethod
    def flag(x: Tensor) -> Tensor:
        return x - x.mean(0) if Normalised.training else x


def test_dropout_behind_a_plan_is_noticed_and_exact():
    net = of_rows(nn.Dropout(0.5))
    A = MIXINGS["dense"]()
    for training in (False, True, False, True):
        net.train(training)
        grads = []
        for way in ("mixing", "stored"):
            net.zero_grad()
            torch.manual_seed(5)
            made = mtlfast.backward(
                net.losses(), Constant([1.0, -1.0, 2.0]), shared=net.trunk, mixing=A, jacobian=way, diagnostics=True
            )
            grads.append([made.gram, *(p.grad.clone() for p in net.parameters())])
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def counted(monkeypatch, net: Model, steps: int, way: str = "mixing", A: Tensor | None = None) -> list[int]:
    """How often autograd was called for gradients in each step."""
    calls = 0
    grad = torch.autograd.grad

    @functools.wraps(grad)
    def count(*given, **more):
        nonlocal calls
        calls += 1
        return grad(*given, **more)

    monkeypatch.setattr(torch.autograd, "grad", count)
    found = []
    for _ in range(steps):
        before = calls
        run(net, way, A)
        found.append(calls - before)
    return found


def test_a_plan_is_probed_again_now_and_then(monkeypatch):
    monkeypatch.setattr(_probe, "AGAIN", 4)
    one = 2  # one pass of the samples, and a short one of the heads
    probe = 1 + _probe.PROBES
    assert counted(monkeypatch, of_rows(nn.Tanh()), 10) == [one + probe * (i % 4 == 0) for i in range(10)]


def test_what_a_probe_refused_is_refused_without_one_for_a_while(monkeypatch):
    monkeypatch.setattr(_probe, "AGAIN", 4)
    net, A = of_rows(nn.BatchNorm1d(D, affine=False)), torch.randn(8, S)
    counts = counted(monkeypatch, net, 6, "auto", A)
    probe = 1 + _probe.PROBES
    assert [count - counts[1] for count in counts] == [probe * (i % 4 == 0) for i in range(6)]


def test_a_plan_is_probed_again_until_no_gradient_leaves_it_open(monkeypatch):
    net = of_rows(nn.Identity(), T)
    with torch.no_grad():
        net.trunk.last.weight.zero_()
    assert counted(monkeypatch, net, 2) == [5, 5]
    with torch.no_grad():
        net.trunk.last.weight.normal_()
    assert counted(monkeypatch, net, 3) == [5, 2, 2]


@pytest.mark.parametrize("tasks", [3, S, S + 3])
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_float64_products_are_for_samples_that_nearly_depend_on_each_other(tasks, apart):
    net = of_rows(nn.Tanh()).float()
    net.given = net.given[:1].float() + apart * torch.randn(S, D)
    run(net, A=torch.randn(tasks, S))
    known = _probe._cache[net.trunk.first.weight]
    (found,) = (plan.wide for plan in known.values())
    assert list(found) == [(tasks, True)]
    assert found[tasks, True].everything == (apart < 1)


@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_float64_products_are_for_tasks_of_samples_that_nearly_depend_on_each_other(apart):
    net = of_rows(nn.Tanh(), T).float()  # rows enough for products of tasks' gradients
    net.given = net.given[:1].float() + apart * torch.randn(S, T, D)
    run(net, A=torch.arange(S) % 2)
    (found,) = (plan.wide for plan in _probe._cache[net.trunk.first.weight].values())
    assert found[2, False].everything == (apart < 1)


def test_what_needs_float64_is_remembered_for_each_number_of_tasks():
    net = of_rows(nn.Tanh()).float()
    net.given = net.given[:1].float() + 1e-3 * torch.randn(S, D)
    run(net, A=torch.randn(3, S))
    run(net, A=torch.ones(1, S))
    (found,) = (plan.wide for plan in _probe._cache[net.trunk.first.weight].values())
    assert {tasks: wide.everything for (tasks, _), wide in found.items()} == {3: True, 1: False}


def test_what_a_task_has_is_shared_out_among_its_samples():
    task = torch.tensor([0, 2, 2, -1, 0])
    samples = samples_of(task, torch.ones(S, requires_grad=True) * 1)[1]
    of_tasks = torch.tensor([4.0, 7.0, 6.0], dtype=torch.float64)
    shares = samples.shared_out(of_tasks)
    assert shares.tolist() == [2, 3, 3, 0, 2]
    assert samples.gram_of_diagonal(shares).diagonal().tolist() == [4, 0, 6]  # task 1 has no samples
