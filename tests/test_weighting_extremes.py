"""Losses and metrics of every size give finite weights of at least 0, or one sentence says why not."""

import copy
import itertools
import re

import pytest
import torch
from weightings import WEIGHTINGS, losses_at

from mtlfast import weighting

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS)
SIZES = {
    torch.float64: [0.0, 1e-310, 1.0, 1e8, 1e30, -1.0],
    torch.float32: [0.0, 1e-40, 1.0, 1e8, 1e30, -1.0],
    torch.bfloat16: [0.0, 1e-39, 1.0, 1e30, -1.0],
    torch.float16: [0.0, 6e-8, 1.0, 6e4, -1.0],
}
SIGNED = ("PBI", "COSMOS")  # whose weights are negative on one side of the preferred direction


def loss_and_weights(made: weighting.LossWeighting, losses, dtype=torch.float64):
    values = torch.tensor(losses, dtype=dtype, requires_grad=True)
    total = made(values)
    return total, torch.autograd.grad(total, values)[0]


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[key].nan_to_num(nan=-7), other[key].nan_to_num(nan=-7)) for key in one)


def combinations(dtype):
    """All of a size; and any two sizes beside 1."""
    for one, other in itertools.combinations_with_replacement(SIZES[dtype], 2):
        yield (one, one, one) if one == other else (one, 1.0, other)


@every_weighting
@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("readable", [True, False])
def test_losses_of_every_size(name, dtype, readable, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not readable)  # as if elsewhere than on the CPU
    for trained, losses in itertools.product((False, True), combinations(dtype)):
        made = WEIGHTINGS[name]()
        if trained:
            made(losses_at(0))
        for _ in range(2):
            before = copy.deepcopy(made.state_dict())
            refusal = None
            try:
                total, weights = loss_and_weights(made, losses, dtype)
            except ValueError as error:
                refusal = str(error)
            if refusal is not None:
                assert readable
                assert "the loss of task" in refusal
                assert same(before, made.state_dict()), losses
            elif not readable and total.isnan():
                assert weights.isnan().all()
                assert sum(made.diagnostics().values()) > 0
            else:
                assert total.isfinite(), losses
                assert weights.isfinite().all(), losses
                assert name.startswith(SIGNED) or (weights >= 0).all(), losses
        for step in (1, 2):
            total, weights = loss_and_weights(made, losses_at(step).tolist(), dtype)
            assert total.isfinite(), losses
            assert weights.isfinite().all(), losses


ONE_TASK = {
    "Constant": lambda: weighting.Constant([2.0]),
    "InverseSampleSize": lambda: weighting.InverseSampleSize([10]),
    "ClassBalanced": lambda: weighting.ClassBalanced([10]),
    "STCH": lambda: weighting.STCH(0.5),
    "PBI": lambda: weighting.PBI(1.0, [1.0]),
    "COSMOS": lambda: weighting.COSMOS(1.0, [1.0]),
    "CurriculumSchedule": lambda: weighting.CurriculumSchedule([0]),
    "AnnealingSchedule": lambda: weighting.AnnealingSchedule([1], [2], 4),
    "AdaptiveWeight": lambda: weighting.AdaptiveWeight.for_tasks(1),
}


@pytest.mark.parametrize("method", [method for methods in weighting.FAMILIES.values() for method in methods])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e8, 1e30])
def test_one_task(method, size):
    try:
        made = ONE_TASK[method.__name__]() if method.__name__ in ONE_TASK else method(1)
    except (TypeError, ValueError):
        made = method()  # without state
    for loss in (size, size, 1.0):
        total, weights = loss_and_weights(made, [loss])
        assert total.isfinite()
        assert weights.isfinite().all()
        assert weights.item() >= 0


def weights_of(made: weighting.LossWeighting, *losses: float) -> list[float]:
    return loss_and_weights(made, losses)[1].tolist()


def test_losses_of_zero():
    for variant in ("original", "normalized", "loss_weighted"):
        assert weights_of(weighting.SoftAdapt(2, variant=variant), 0, 0) == [0.5, 0.5]
    first = weighting.LossRescaling(2)
    assert weights_of(first, 0, 4) == [1, 0.25]  # no scale yet
    assert weights_of(first, 2, 4) == [0.5, 0.25]  # its first loss that is not 0
    assert weights_of(first, 0, 4) == [0.5, 0.25]
    mean = weighting.LossRescaling(2, by="mean", decay=0.5)
    weights_of(mean, 4, 4)
    assert weights_of(mean, 0, 4) == [0.5, 0.25]
    for _ in range(2000):
        weights = weights_of(mean, 0, 4)
    assert torch.tensor(weights).isfinite().all()
    assert weights_of(mean, 2, 4) == pytest.approx([1, 0.25])  # half of 2
    relative = weighting.ReLoBRaLo(2, alpha=0.0)
    weights_of(relative, 2, 2)
    total = 1 + torch.e
    assert weights_of(relative, 0, 2) == pytest.approx([2 / total, 2 * torch.e / total])  # rates 0 and 1
    assert weights_of(relative, 1, 2) == [2, 0]  # it rose from 0
    assert weights_of(relative, 1, 2) == [1, 1]
    looking_back = weighting.ReLoBRaLo(2, alpha=1.0, beta=0.0)
    weights_of(looking_back, 0, 2)
    assert weights_of(looking_back, 4, 2) == [1, 1]  # its first loss that is not 0
    # D = 1e-8 and 1: the weights are 1 / D, over their sum.
    assert weights_of(weighting.FAMO(2), 0, 1) == pytest.approx([1, 1e-8])
    assert weights_of(weighting.FAMO(2, min_losses=[0.5, 0]), 0.5, 1) == pytest.approx([1, 1e-8])
    # Where the cosine has no derivative the weights are the preferences.
    assert weights_of(weighting.COSMOS(2.0, [0.2, 0.8]), 0, 0) == [0.2, 0.8]
    rates = weighting.DWA(2, temperature=0.1)
    for losses in ([0, 1], [0, 1]):
        rates.update(losses=losses)
    assert weights_of(rates, 1, 1) == [1, 1]
    rates.update(losses=[1, 1])
    assert weights_of(rates, 1, 1) == [2, 0]  # it rose from 0


def test_large_losses():
    # Risks exp(-0.1) : 1, indicators 2 : 2.
    expected = [2 / (1 + torch.e**0.1) * torch.e**0.1, 2 / (1 + torch.e**0.1)]
    assert weights_of(weighting.GO4Align(2), 1e8, 1e8 + 1e3) == pytest.approx(expected, rel=1e-4)
    aligned = weighting.GO4Align(2, num_groups=2)
    weights_of(aligned, 1.0, 1e8)
    assert weights_of(aligned, 1.0, 1.0) == pytest.approx([2, 0])  # its risk is almost 0 now
    only = torch.ones(1, requires_grad=True)
    aligned(only, tasks=(1,)).backward()
    assert only.grad.tolist() == [1]
    # (3, 4) 1e30 along (1, 0).
    large = weighting.PBI(5.0, [2, 0])(torch.tensor([3e30, 4e30]))
    assert large.item() == pytest.approx(23e30)
    assert weighting.COSMOS(2.0, [1, 0])(torch.tensor([3e30, 4e30])).item() == pytest.approx(3e30)
    assert weighting.STCH(1e-50)(torch.tensor([4.0, 2.0])).item() == 2
    assert weights_of(weighting.InverseSampleSize([10, 1000], beta=1000), 1, 1) == [2, 0]


def test_temperatures_of_every_size():
    steep = weighting.SoftAdapt(2, beta=1e300)
    weights_of(steep, 1, 1)
    assert weights_of(steep, 1e30, 1) == [1, 0]
    cold = weighting.ReLoBRaLo(2, alpha=0.0, tau=1e-310)
    for _ in range(2):
        assert weights_of(cold, 0, 1) == [1, 1]


@pytest.mark.parametrize("preferences", [[1e-30, 0], [1e30, 0], [1e-200, 0]])
def test_preferences_of_every_size(preferences):
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float32 and preferences[0] == 1e-200:
            continue  # 0 there
        for made in (weighting.PBI(5.0, preferences), weighting.COSMOS(5.0, preferences)):
            total, weights = loss_and_weights(made, [3.0, 4.0], dtype)
            assert weights.isfinite().all()
            expected = 23 if type(made) is weighting.PBI else 3 * preferences[0] - 5 * 3 / 5
            assert total.item() == pytest.approx(expected)


def test_absent_tasks_may_have_all_the_preference():
    values = torch.tensor([3.0, 4.0], requires_grad=True)
    total = weighting.PBI(2.0, [1, 0, 0])(values, tasks=(1, 2))
    assert total.item() == pytest.approx(10)  # 2 |L|
    assert torch.autograd.grad(total, values)[0].tolist() == pytest.approx([1.2, 1.6])


# How each is made, the weights of a metric, and what is refused.
BY_PERFORMANCE = {
    "InversePerformance": (lambda: weighting.InversePerformance(2), [-1.0, -85.0], "a number above -1"),
    "DynamicTaskPrioritization": (
        lambda: weighting.DynamicTaskPrioritization(2, gamma=1.5),
        [-1e-3, 1.001, 85.0, 1e30],
        "a share from 0 to 1",
    ),
}


@pytest.mark.parametrize("name", BY_PERFORMANCE)
@pytest.mark.parametrize("metric", [0.0, 1e-310, 1e-40, 0.3, 1.0, 1.001, 85.0, 1e30, -1e-3, -0.9, -1.0, -85.0])
def test_metrics_of_every_size(name, metric):
    make, _, expected = BY_PERFORMANCE[name]
    made = make()
    made.update(metrics=[0.5, 0.5])
    before = copy.deepcopy(made.state_dict())
    refusal = None
    try:
        made.update(metrics=[0.5, metric])
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal == f"{name}: the metric of task 1 is {metric:g}, expected {expected}"
        assert same(before, made.state_dict())
    weights = weights_of(made, 1, 1)
    assert torch.tensor(weights).isfinite().all()
    assert min(weights) >= 0
    made.update(metrics=[0.5, 0.5])
    assert torch.tensor(weights_of(made, 1, 1)).isfinite().all()


@pytest.mark.parametrize("name", BY_PERFORMANCE)
def test_metrics_out_of_range(name, monkeypatch, device):
    make, metrics, expected = BY_PERFORMANCE[name]
    made = make().to(device)
    for metric in metrics:
        with pytest.raises(
            ValueError, match=re.escape(f"{name}: the metric of task 1 is {metric:g}, expected {expected}")
        ):
            made.update(metrics=[0.5, metric])
    made.update(metrics=[0.5, 0.5])
    # Where to look would wait: NaN until the next metric, and a count.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    before = copy.deepcopy(made.state_dict())
    made.update(metrics=torch.tensor([0.25, metrics[0]], device=device))
    assert made.diagnostics() == {"out_of_range": 1}
    assert made.performance[1] == before["performance"][1]
    assert made(torch.ones(2, device=device)).isnan()
    made.update(metrics=torch.tensor([0.25, 0.5], device=device))
    assert made(torch.ones(2, device=device)).isfinite()
    made.reset()
    assert made.diagnostics() == {"out_of_range": 0}


def test_famo_refuses_feedback_below_its_bounds(monkeypatch, device):
    made = weighting.FAMO(2, min_losses=[0.5, 0]).to(device)
    made(torch.tensor([1.0, 1.0], device=device))
    before = copy.deepcopy(made.state_dict())
    if device == "cpu":
        with pytest.raises(
            ValueError, match=r"FAMO: the loss of task 0 is 0.4, expected a number above 0.5 or equal to"
        ):
            made.update(losses=[0.4, 1])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made.update(losses=[0.4, 1])
    assert made.diagnostics() == {"nonpositive": 1}
    assert torch.equal(made.logits, before["logits"])
    made.update(losses=[0.5, 1])
    assert made.logits.isfinite().all()
    assert not torch.equal(made.logits, before["logits"])


def test_a_bound_in_float32_is_reached():
    made = weighting.FAMO(2, min_losses=[0.7, 0.7])  # which float32 rounds down
    losses = torch.tensor([0.7, 0.7])
    assert made(losses).isfinite()
    made.update(losses=losses)
    assert made.logits.isfinite().all()
