"""Calls in training mode and `step_weights` in either mode are steps, and feedback counts whenever it is given."""

import copy

import pytest
import torch
from weightings import WEIGHTINGS, call, feed, losses_at, norms_for

from mtlfast import weighting

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS)


def trained(name: str, device: str = "cpu") -> weighting.LossWeighting:
    torch.manual_seed(0)
    made = WEIGHTINGS[name]().to(device)
    for step in range(3):
        made(losses_at(step, device))
        feed(made, step)
    return made


def same_state(one: weighting.LossWeighting, other: weighting.LossWeighting) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7)) for a, b in pairs)


@every_weighting
def test_feedback_counts_in_either_mode(name, device):
    training, evaluated = trained(name, device), trained(name, device).eval()
    for made in (training, evaluated):
        feed(made, 3)
        made.update(losses=[0.5, 0.25, 0.75], metrics=[0.5, 0.25, 0.75])
    assert same_state(training, evaluated)
    fed = name.split(",")[0] in ("DWA", "FAMO", "InversePerformance", "DynamicTaskPrioritization")
    fed = fed or training.reads_norms
    assert same_state(evaluated, trained(name, device)) != (fed or name == "AnnealingSchedule, updates")


def test_expected_weights_after_eval():
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    (weights,) = torch.autograd.grad(weighting.Random().eval()(values), values)
    assert weights.tolist() == pytest.approx([1 / 3] * 3)
    # The mean over many draws of the same step.
    made = weighting.ReLoBRaLo(3, alpha=0.8, beta=0.3)
    for step in range(3):
        made(losses_at(step))
    drawn = []
    for _ in range(400):
        (weights,) = torch.autograd.grad(copy.deepcopy(made)(values), values)
        drawn.append(weights)
    (expected,) = torch.autograd.grad(made.eval()(values), values)
    first = next(weights for weights in drawn if not torch.equal(weights, drawn[0]))
    looked_back = torch.stack([(weights == drawn[0]).all() for weights in drawn]).double().mean()
    assert 0.2 < looked_back < 0.8
    share = (expected - drawn[0]) / (first - drawn[0])
    assert torch.allclose(share, share[0].expand(3))
    assert min(share[0], 1 - share[0]).item() == pytest.approx(0.3)


@every_weighting
@pytest.mark.parametrize("training", [True, False])
def test_step_weights_is_a_step_in_either_mode(name, training, device):
    called, stepped = trained(name, device), trained(name, device).train(training)
    values = losses_at(3, device).requires_grad_()
    torch.manual_seed(1)
    parameters = list(called.parameters())
    wanted = torch.autograd.grad(call(called, values, 3), [values, *parameters])
    torch.manual_seed(1)
    step = stepped.step_weights(values, **norms_for(stepped, 3, device))
    assert same_state(stepped, trained(name, device))  # not before it is over
    step.commit()
    assert same_state(stepped, called)
    assert stepped.training is training
    assert torch.equal(step.loss_weights, wanted[0])
    for (parameter, gradient), other, expected in zip(step.learned, stepped.parameters(), wanted[1:], strict=True):
        assert parameter is other
        assert torch.equal(gradient, expected)
    # A call after it is what it was before: in training mode state moves at once, else not at all.
    torch.manual_seed(2)
    stepped(losses_at(4, device))
    torch.manual_seed(2)
    called.train(training)(losses_at(4, device))
    assert same_state(stepped, called)


@every_weighting
def test_step_weights_of_some_tasks(name, device):
    called, stepped = trained(name, device), trained(name, device)
    values = losses_at(3, device)[[0, 2]].requires_grad_()
    torch.manual_seed(1)
    (wanted,) = torch.autograd.grad(call(called, values, 3, tasks=(0, 2)), values)
    torch.manual_seed(1)
    step = stepped.step_weights(values, tasks=(0, 2), **norms_for(stepped, 3, device, (0, 2)))
    step.commit()
    assert torch.equal(step.loss_weights, wanted)
    assert same_state(stepped, called)


@every_weighting
@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_step_weights_of_scaled_losses(name, scale, device):
    plain, scaled = trained(name, device), trained(name, device)
    torch.manual_seed(1)
    norms = norms_for(plain, 3, device)
    one = plain.step_weights(losses_at(3, device), **norms)
    for given in (scale, torch.tensor(scale, device=device)):
        torch.manual_seed(1)
        other = scaled.step_weights(scale * losses_at(3, device), loss_scale=given, **norms)
        assert torch.equal(other.loss_weights, one.loss_weights)
        for (_, gradient), (_, expected) in zip(other.learned, one.learned, strict=True):
            assert torch.equal(gradient, scale * expected)


@every_weighting
def test_a_step_that_fails_leaves_everything(name):
    made = trained(name).eval()
    with pytest.raises(ValueError, match=": losses is a tensor of shape"):
        made.step_weights(torch.ones(3, 1), norms=torch.ones(3, 1))
    assert not made.training
    assert made._held is made._norms is None
    made.step_weights(losses_at(3), **norms_for(made, 3))  # dropped, as by a failure in a later backward pass
    assert same_state(made, trained(name))


def test_a_weight_that_is_not_finite_is_refused():
    class Inverse(weighting.LossWeighting):
        def combine(self, values, tasks):
            return values.log().sum()

    with pytest.raises(ValueError, match="Inverse: loss 1 is 0 and its weight inf, expected a finite one"):
        Inverse().step_weights(torch.tensor([1.0, 0.0]))
    assert Inverse().step_weights(torch.tensor([1.0, torch.nan])).loss_weights.isnan().any()  # a step to be skipped


def test_weightings_within_a_weighting():
    class Half(weighting.LossWeighting):
        def __init__(self):
            super().__init__()
            self.inner = weighting.FreezeConverged(3)

        def combine(self, values, tasks):
            return self.inner.combine(values, tasks) / 2

    made = Half()
    made.inner.eval()
    step = made.step_weights(losses_at(0))
    assert made.inner.mean.isnan().all()
    step.commit()
    assert made.inner.mean.isfinite().all()
    assert made.training
    assert not made.inner.training
