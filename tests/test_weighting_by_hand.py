"""Each loss weighting's formula, with numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from mtlfast import weighting


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def weights_of(made: weighting.LossWeighting, *losses: float, tasks=None) -> list[float]:
    """d weighting(losses) / d losses."""
    values = vector(*losses).requires_grad_()
    (gradient,) = torch.autograd.grad(made(values, tasks=tasks), values)
    return gradient.tolist()


def test_fixed_weights():
    assert weighting.Sum()(vector(1, 2, 4)).item() == 7
    assert weighting.Mean()(vector(1, 2, 6)).item() == 3
    assert weighting.Mean()([torch.tensor(1.0), None, torch.tensor(5.0)]).item() == 3
    constant = weighting.Constant(vector(0.5, 2, -1))
    assert constant(vector(1, 2, 4)).item() == 0.5
    assert weights_of(constant, 1, 1, tasks=(0, 2)) == [0.5, -1]


def test_by_sample_size():
    # 1/10, 1/20, 1/40 are as 4 : 2 : 1, and add up to 3.
    assert weights_of(weighting.InverseSampleSize(vector(10, 20, 40)), 1, 1, 1) == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    # Roots: 1/2, 1/4.
    assert weights_of(weighting.InverseSampleSize(vector(4, 16), beta=0.5), 1, 1) == pytest.approx([4 / 3, 2 / 3])
    by_size = weighting.InverseSampleSize(vector(10, 20, 40))
    assert weights_of(by_size, 1, 1, tasks=(1, 2)) == pytest.approx([4 / 3, 2 / 3])
    # (1 - 0.5) / (1 - 0.5^1) = 1, (1 - 0.5) / (1 - 0.5^2) = 2/3: as 3 : 2.
    assert weights_of(weighting.ClassBalanced(vector(1, 2), beta=0.5), 1, 1) == pytest.approx([1.2, 0.8])
    assert weights_of(weighting.ClassBalanced(vector(1, 200), beta=0), 1, 1) == pytest.approx([1, 1])
    # Towards beta = 1 the inverse sample size, without cancellation.
    nearly = weighting.ClassBalanced(vector(1, 3), beta=1 - 1e-12)
    assert weights_of(nearly, 1, 1) == pytest.approx([1.5, 0.5], rel=1e-6)


def test_loss_rescaling():
    first = weighting.LossRescaling(2)
    assert first(vector(2, 5)).item() == 2
    assert weights_of(first, 4, 5) == [0.5, 0.2]
    mean = weighting.LossRescaling(2, by="mean", decay=0.75)
    assert weights_of(mean, 2, 4) == [0.5, 0.25]
    assert weights_of(mean, 6, 4) == pytest.approx([1 / 3, 0.25])  # 0.75 * 2 + 0.25 * 6 = 3
    log = weighting.LossRescaling(2, by="log")
    assert log(vector(math.e, math.e**2)).item() == pytest.approx(3)
    assert weights_of(log, 2, 4) == [0.5, 0.25]


def test_random_weights_add_up_to_one():
    torch.manual_seed(0)
    drawn = [weights_of(weighting.Random(), 1, 1, 1) for _ in range(3)]
    assert all(sum(weights) == pytest.approx(1) and min(weights) > 0 for weights in drawn)
    assert drawn[0] != drawn[1]


def test_inverse_performance():
    made = weighting.InversePerformance(2, decay=0.5)
    assert weights_of(made, 1, 1) == [1, 1]
    made.update(metrics=[1.0, 0.0])
    assert weights_of(made, 1, 1) == pytest.approx([2 / 3, 4 / 3])  # 1/2 : 1
    made.update(metrics=[0.0, None])
    assert weights_of(made, 1, 1) == pytest.approx([0.8, 1.2])  # 1 / 1.5 : 1


def test_dynamic_task_prioritization():
    made = weighting.DynamicTaskPrioritization(3, gamma=2.0, decay=0.5)
    made.update(metrics=[0.5, 1.0, None])
    assert weights_of(made, 1, 1, 1) == pytest.approx([0.25 * math.log(2), 0, 1])
    made.update(metrics=[0.25, 1.0, None])
    assert weights_of(made, 1, 1, 1)[0] == pytest.approx(-((1 - 0.375) ** 2) * math.log(0.375))


def softmax(*numbers: float) -> list[float]:
    return [math.exp(n) / sum(map(math.exp, numbers)) for n in numbers]


def test_dwa():
    made = weighting.DWA(2, temperature=2.0)
    assert weights_of(made, 4, 4) == [1, 1]
    weights_of(made, 8, 2)
    made.update()  # means 6, 3
    assert weights_of(made, 3, 3) == pytest.approx([1, 1])
    made.step()  # 3, 3: rates 1/2, 1
    expected = [2 * w for w in softmax(0.25, 0.5)]
    assert weights_of(made, 1, 1) == pytest.approx(expected)
    assert weights_of(made, 9, 9) == pytest.approx(expected)  # the epoch is not over
    made.update(losses=[torch.tensor(6.0), torch.tensor(3.0)])  # rates 2, 1
    assert weights_of(made, 1, 1) == pytest.approx([2 * w for w in softmax(1, 0.5)])


def test_dwa_by_window():
    made = weighting.DWA(2, temperature=1.0, window=2)
    for losses in ((4, 4), (8, 2), (3, 3), (3, 3)):
        assert weights_of(made, *losses) == [1, 1]
    assert weights_of(made, 5, 5) == pytest.approx([2 * w for w in softmax(0.5, 1)])


def test_soft_adapt():
    made = weighting.SoftAdapt(2, beta=0.5)
    assert weights_of(made, 4, 1) == [0.5, 0.5]
    assert weights_of(made, 2, 2) == pytest.approx(softmax(-1, 0.5))
    normalized = weighting.SoftAdapt(2, beta=2.0, variant="normalized")
    assert weights_of(normalized, 4, 1) == [0.5, 0.5]
    assert weights_of(normalized, 1, 2) == pytest.approx(softmax(-1.5, 0.5))  # -3/4, 1/4
    weighted = weighting.SoftAdapt(2, beta=0.5, variant="loss_weighted")
    weights_of(weighted, 4, 1)
    a, b = softmax(-1, 0.5)
    assert weights_of(weighted, 2, 6) == pytest.approx(
        [2 * (a2 := softmax(-1, 2.5)[0]) / (2 * a2 + 6 * (1 - a2)), 6 * (1 - a2) / (2 * a2 + 6 * (1 - a2))]
    )
    assert a + b == pytest.approx(1)


@pytest.mark.parametrize("looks_back", [True, False])
def test_relobralo(looks_back):
    made = weighting.ReLoBRaLo(2, alpha=0.75, beta=0.0 if looks_back else 1.0, tau=0.5)
    assert weights_of(made, 4, 1) == pytest.approx([1, 1])
    weights_of(made, 2, 1)
    # Since the last step 1/2 and 2, since the first 1/4 and 2; over tau.
    last, first = ([2 * w for w in softmax(*rates)] for rates in ((1, 4), (0.5, 4)))
    before = [0.75 * 1 + 0.25 * 2 * w for w in softmax(1, 2)]
    if looks_back:
        before = first
    expected = [0.75 * old + 0.25 * new for old, new in zip(before, last, strict=True)]
    assert weights_of(made, 1, 2) == pytest.approx(expected)


def test_famo():
    made = weighting.FAMO(2, min_losses=vector(1, 0), lr=0.1, weight_decay=0.0)
    # z = 1/2 each; sum z / D = 1/4 + 1/8, so the weights are (1/4, 1/8) over 3/8.
    assert made(vector(3, 4)).item() == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / 0.375)
    assert weights_of(made, 3, 4) == pytest.approx([2 / 3, 1 / 3])
    # The first loss halves, the second stays: its logit falls by lr, Adam's first step, the other's rises.
    made.update(losses=vector(2, 4))
    assert made.logits.tolist() == pytest.approx([-0.1, 0.1])
    z = softmax(-0.1, 0.1)
    total = z[0] / 2 + z[1] / 4
    assert weights_of(made, 3, 4) == pytest.approx([z[0] / 2 / total, z[1] / 4 / total])


def test_go4align():
    made = weighting.GO4Align(3, num_groups=3, eta=0.0)
    assert weights_of(made, 1, 2, 3) == pytest.approx([2, 1, 2 / 3])  # 6 / L / 3
    two = weighting.GO4Align(3, num_groups=2, eta=0.0)
    assert weights_of(two, 1, 2, 3) == pytest.approx([2, 5 / 6, 5 / 6])
    one = weighting.GO4Align(3, num_groups=1, eta=0.0)
    assert weights_of(one, 1, 2, 3) == pytest.approx([11 / 9] * 3)
    risky = weighting.GO4Align(2, num_groups=2, eta=math.log(2))
    assert weights_of(risky, 1, 2) == pytest.approx([3 * 2 / 3, 1.5 / 3])  # risks 1/2 : 1/4


def test_uwso():
    assert weights_of(weighting.UWSO(), 1, 0.5) == pytest.approx(softmax(1, 2))
    cold = weighting.UWSO(temperature=0.5)
    assert weights_of(cold, 1, 0.5, 2) == pytest.approx(softmax(2, 4, 1))
    assert cold(vector(1, 0.5)).item() == pytest.approx(softmax(2, 4)[0] + 0.5 * softmax(2, 4)[1])
    assert weights_of(cold, 1, 2, tasks=(0, 5)) == pytest.approx(softmax(2, 1))
    # The inverse of a small loss is large or infinite, and the softmax of that is still one.
    assert weights_of(weighting.UWSO(temperature=1e-9), 1e-3, 2e-3, 1e-300) == [0, 0, 1]
    assert weights_of(weighting.UWSO(), 1, 5e-324) == [0, 1]
    assert weights_of(weighting.UWSO(), 1, 0, -0.0) == [0, 0.5, 0.5]
    # The authors' formula adds 1e-8.
    losses = torch.rand(20, 4, dtype=torch.float64) + 0.1
    for row in losses:
        theirs = torch.softmax(1 / (row + 1e-8) / 2.0, dim=-1)
        assert weights_of(weighting.UWSO(temperature=2.0), *row.tolist()) == pytest.approx(theirs.tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="UWSO: the loss of task 1 is -1, expected a number above 0 or equal to it"):
        weighting.UWSO()(vector(1, -1))
    with pytest.raises(ValueError, match="UWSO: temperature is 0, expected a number above 0"):
        weighting.UWSO(temperature=0)


def stepped(made: weighting.LossWeighting, norms, losses=(1.0, 1.0), **context) -> list[float]:
    """The weights of a step with these norms, after which the state moves."""
    step = made.step_weights(vector(*losses), norms=vector(*norms), **context)
    step.commit()
    return step.loss_weights.tolist()


def test_gradnorm():
    made = weighting.GradNorm(2, alpha=1.0, lr=0.1, optimizer="sgd")
    # The first losses: rates 1. Lengths 3 and 1 have the mean 2, so the slopes are 3 and -1; 0.7 and 1.1 add up to 1.8.
    assert stepped(made, (3, 1), (2, 4)) == [1, 1]
    assert made.current_weights.tolist() == pytest.approx([7 / 9, 11 / 9])
    # The second loss has halved, the first not: rates 4/3 and 2/3. Lengths 7/9 and 11/9: mean 1, targets 4/3 and 2/3.
    assert stepped(made, (1, 1), (2, 2)) == pytest.approx([7 / 9, 11 / 9])
    assert made.current_weights.tolist() == pytest.approx([7 / 9 + 0.1, 11 / 9 - 0.1])
    # alpha = 2: targets 16/9 and 4/9 of the mean length, 1, so that both are too short; with 1 the first were too long.
    strong = weighting.GradNorm(2, alpha=2.0, lr=0.1, optimizer="sgd", initial_losses=[2, 4])
    stepped(strong, (1.75, 0.25), (2, 2))
    assert strong.current_weights.tolist() == pytest.approx([2 * 1.175 / 2.2, 2 * 1.025 / 2.2])


def test_gradnorm_of_logarithms_and_logits():
    log = weighting.GradNorm(2, alpha=0.0, lr=0.1, optimizer="sgd", form="log")
    assert stepped(log, (3, 1)) == [1, 1]
    assert log.current_weights.tolist() == pytest.approx([2 * w for w in softmax(-0.3, 0.1)])
    # Slopes of the logarithms: the weights times the slopes.
    w = log.current_weights.tolist()
    stepped(log, (1, 3))
    assert log.current_weights.tolist() == pytest.approx(
        [2 * w for w in softmax(-0.3 + 0.1 * w[0], 0.1 - 0.1 * 3 * w[1])]
    )
    # Of the softmax: 3 and -1 less their weighted mean, 1.
    logits = weighting.GradNorm(2, alpha=0.0, lr=0.1, optimizer="sgd", form="softmax")
    stepped(logits, (3, 1))
    assert logits.current_weights.tolist() == pytest.approx([2 * w for w in softmax(-0.2, 0.2)])


def test_gradnorm_by_adam_and_without_negative_weights():
    adam = weighting.GradNorm(2, alpha=0.0, lr=0.1)
    stepped(adam, (3e-4, 1e-4))  # a first step of Adam is lr whatever the slope is
    assert adam.current_weights.tolist() == pytest.approx([0.9, 1.1], rel=1e-4)
    fast = weighting.GradNorm(2, alpha=0.0, lr=1.0, optimizer="sgd")
    stepped(fast, (3, 1))
    assert fast.current_weights.tolist() == [0, 2]
    stepped(fast, (3, 1))  # 0 is below 1
    assert fast.current_weights.tolist() == pytest.approx([3 / 4 * 2, 1 / 4 * 2])


def test_inverse_norm_loss():
    made = weighting.InverseNormLoss(2, decay=0.5)
    assert stepped(made, (3, 1)) == pytest.approx([0.5, 1.5])
    assert stepped(made, (1, 3)) == pytest.approx([1, 1])  # means 2 and 2
    assert stepped(made, (0, 6)) == pytest.approx([4 / 3, 2 / 3])  # 2 and 4
    assert weights_of(made, 1, 1) == pytest.approx([4 / 3, 2 / 3])
    new = weighting.InverseNormLoss(3)
    assert stepped(new, (0, 2, 1), (1, 1, 1)) == pytest.approx([1, 2 / 3, 4 / 3])  # no norm of the first is known


def test_lr_annealing():
    made = weighting.LRAnnealing(2, reference=1, decay=0.75)
    assert stepped(made, (2, 6)) == pytest.approx([0.75 + 0.25 * 3, 1])
    assert stepped(made, (2, 1)) == pytest.approx([0.75 * 1.5 + 0.25 * 0.5, 1])
    for norms in ((2, 0), (0, 1)):
        assert stepped(made, norms) == pytest.approx([0.75 * 1.5 + 0.25 * 0.5, 1])
    assert made.norm_order == 1
    assert weighting.LRAnnealing(2, norm_order=2).norm_order == 2


def test_adaptive_weight():
    made = weighting.AdaptiveWeight(3, factor=0.5, max_weight=10, eps=0.25, start=1)
    assert stepped(made, (4, 1, 9), (1, 1, 1)) == [1, 0, 1]
    assert stepped(made, (4, 1, 9), (1, 1, 1)) == [1, 0.5 * 4 / 2, 1]
    assert stepped(made, (4, 0, 9), (1, 1, 1)) == [1, 0.5 * 4, 1]  # 1 / eps
    assert stepped(made, (4, 9), tasks=(1, 2)) == [0.5 * 4, 1]  # without the reference: the last
    largest = weighting.AdaptiveWeight(2, max_weight=3)
    assert stepped(largest, (4, 1)) == [1, 3]


def test_learned_weights():
    uncertainty = weighting.UW(2, classification=[False, True])
    uncertainty.log_var.data = torch.tensor([0.0, math.log(4)])
    assert uncertainty(vector(3, 8)).item() == pytest.approx(1.5 + 2 + 0.5 * math.log(4))
    uncertainty(vector(3, 8)).backward()
    assert uncertainty.log_var.grad.tolist() == pytest.approx([-1, -1.5])
    impartial = weighting.IMTLL(2)
    impartial.log_scale.data = torch.tensor([0.0, math.log(2)])
    assert impartial(vector(3, 5)).item() == pytest.approx(3 + 10 - math.log(2))
    # At the minimum over the scales all scaled losses are 1.
    assert weights_of(impartial, 3, 5) == pytest.approx([1, 2])


def test_scalarizations():
    assert weighting.GeometricMean()(vector(2, 4, 8)).item() == pytest.approx(4)
    assert weights_of(weighting.GeometricMean(), 2, 8) == pytest.approx([4 / 2 / 2, 4 / 8 / 2])
    assert weighting.GeometricMean()(torch.full((50,), 1e-20)).item() == pytest.approx(1e-20)  # the product is 0
    worst = weighting.Tchebycheff(vector(1, 2), vector(1, 0))
    assert worst(vector(4, 2)).item() == 4
    assert weights_of(worst, 6, 2) == [1, 0]
    smooth = weighting.STCH(0.5, vector(1, 2), vector(1, 0))
    assert smooth(vector(4, 2)).item() == pytest.approx(0.5 * math.log(math.exp(6) + math.exp(8)))
    assert weights_of(smooth, 4, 2) == pytest.approx([softmax(6, 8)[0], 2 * softmax(6, 8)[1]])
    assert weighting.STCH(1e-3)(vector(4e4, 2)).item() == pytest.approx(2e4)
    # (3, 4) along (1, 0): 3, and 4 away.
    assert weighting.PBI(5.0, vector(2, 0))(vector(3, 4)).item() == pytest.approx(23)
    assert weighting.PBI(5.0, vector(2, 0), vector(3, 0))(vector(3, 4)).item() == pytest.approx(20)
    assert weighting.COSMOS(2.0, vector(1, 0))(vector(3, 4)).item() == pytest.approx(3 - 2 * 0.6)


def test_curriculum_schedule():
    made = weighting.CurriculumSchedule([0, 1, 2], ramp=1)
    seen = [weights_of(made, 1, 1, 1) for _ in range(4)]
    assert seen == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5], [1, 1, 1]]
    at_once = weighting.CurriculumSchedule([0, 1], unit="update")
    assert [weights_of(at_once, 1, 1) for _ in range(3)] == [[1, 0]] * 3
    at_once.update()
    assert weights_of(at_once, 1, 1) == [1, 1]


def test_annealing_schedule():
    linear = weighting.AnnealingSchedule([1, 0], [0, 2], steps=4)
    assert [weights_of(linear, 1, 1) for _ in range(6)] == [[1, 0], [0.75, 0.5], [0.5, 1], [0.25, 1.5], [0, 2], [0, 2]]
    cosine = weighting.AnnealingSchedule([1], [0], steps=4, shape="cosine")
    slow = (1 + math.cos(math.pi / 4)) / 2
    assert [weights_of(cosine, 1)[0] for _ in range(5)] == pytest.approx([1, slow, 0.5, 1 - slow, 0])
    exponential = weighting.AnnealingSchedule([1], [0.25], steps=2, shape="exponential")
    assert [weights_of(exponential, 1)[0] for _ in range(3)] == pytest.approx([1, 0.5, 0.25])


def test_priority_task():
    made = weighting.PriorityTask(3, task=1, weight=0.6)
    assert weights_of(made, 1, 1, 1) == pytest.approx([0.2, 0.6, 0.2])
    assert weights_of(made, 1, 1, tasks=(0, 1)) == pytest.approx([0.4, 0.6])
    assert weights_of(made, 1, 1, tasks=(0, 2)) == pytest.approx([0.5, 0.5])
    assert weights_of(made, 1, tasks=(1,)) == pytest.approx([0.6])


def test_freeze_converged():
    made = weighting.FreezeConverged(2, patience=2, tolerance=0.1, frozen_weight=0.25, decay=0.0)
    # The first task falls to 5 and stays for two steps; the second falls on.
    seen = [weights_of(made, a, b) for a, b in ((10, 8), (5, 7), (4.9, 6), (4.8, 5))]
    assert seen == [[1, 1], [1, 1], [1, 1], [0.25, 1]]
    assert weights_of(made, 5.2, 4) == [0.25, 1]  # up by less than a tenth of 4.8
    assert weights_of(made, 5.4, 3.5) == [1, 1]
    # 5.4 is its best now, and patience starts anew.
    assert [weights_of(made, 5.3, b)[0] for b in (3, 2.5)] == [1, 0.25]
    # Losses below zero: a tenth of their size.
    negative = weighting.FreezeConverged(1, patience=1, tolerance=0.1, decay=0.0)
    assert [weights_of(negative, loss)[0] for loss in (-1, -2, -2.1, -1.95, -1.8)] == [1, 1, 0, 0, 1]
