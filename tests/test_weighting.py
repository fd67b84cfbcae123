"""Every loss weighting: state, absent tasks, saving, casts, compilation, surgery. The rows are in weightings.py."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from weightings import WEIGHTINGS, feed, losses_at

import mtlfast
from mtlfast import training, weighting
from mtlfast.aggregation import PCGrad, Sum
from mtlfast.weighting import _base

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS)
OF_POSITIVE = [name for name, make in WEIGHTINGS.items() if isinstance(make(), _base.NeedsPositiveLosses)]
# "FAMO, bounds" has bounds above 0
TAKE_ZERO = ["FAMO", "ReLoBRaLo", "LossRescaling, first", "LossRescaling, mean", "UWSO"]
TAKE_ZERO += [name for name in WEIGHTINGS if name.startswith("GradNorm")]


def trained(name: str, device: str, steps: int = 3) -> weighting.LossWeighting:
    """After some steps of training."""
    made = WEIGHTINGS[name]().to(device)
    for step in range(steps):
        made(losses_at(step, device))
        feed(made, step)
    return made


def weigh(made: weighting.LossWeighting, losses, seed: int = 0, **context):
    torch.manual_seed(seed)
    return made(losses, **context)


@every_weighting
def test_surgery_sees_the_gradients_of_the_weighted_loss(name, device):
    # With the plain sum of the weighted tasks' gradients: weighting(losses).backward(), parameters and all.
    models = [torch.nn.Linear(4, 3).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    weightings = [trained(name, device) for _ in range(2)]
    x = torch.rand(8, 4, device=device)
    losses = [model(x).square().mean(dim=0) + 0.2 for model in models]
    norms = {}
    if weightings[0].reads_norms:
        gradients = [torch.autograd.grad(loss, models[0].weight, retain_graph=True)[0] for loss in losses[0]]
        order = weightings[0].norm_order
        norms = {"norms": torch.stack([torch.linalg.vector_norm(gradient, order) for gradient in gradients])}
        step = weightings[0].step_weights(losses[0], **norms)
        (step.loss_weights * losses[0]).sum().backward()
        step.commit()
    else:
        weigh(weightings[0], losses[0]).backward()
    torch.manual_seed(0)
    result = mtlfast.backward(
        list(losses[1]), Sum(), shared=[models[1].weight], weighting=weightings[1], diagnostics=True
    )
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    for one, other in zip(weightings[0].parameters(), weightings[1].parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5)
    for one, other in zip(weightings[0].buffers(), weightings[1].buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-6, equal_nan=True)
    again = trained(name, device)
    torch.manual_seed(0)
    expected = again.step_weights(losses[0], **norms).loss_weights
    assert torch.allclose(result.loss_weights, expected, rtol=1e-5)


@every_weighting
def test_with_loss_scale_the_weighting_sees_the_losses_without_it(name, device):
    gradients = []
    for scale in (1.0, 1024.0):
        made = trained(name, device)
        p = torch.nn.Parameter(torch.linspace(0.1, 1, 5, device=device))
        losses = [scale * ((p - k).square().mean() + 0.2) for k in range(3)]
        torch.manual_seed(0)
        given = None if scale == 1 else torch.tensor(scale, device=device)
        result = mtlfast.backward(losses, Sum(), shared=[p], weighting=made, loss_scale=given)
        gradients.append([p.grad / scale, result.loss_weights, *(q.grad / scale for q in made.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


@every_weighting
def test_state_survives_saving_and_casts(name, device):
    first = trained(name, device)
    second = WEIGHTINGS[name]().to(device)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    third = copy.deepcopy(first).half().float()  # rounds what is learned, not the state
    learns = any(True for _ in first.parameters())
    for step in (3, 4):
        wanted = weigh(first, losses_at(step, device), step)
        assert torch.equal(weigh(second, losses_at(step, device), step), wanted)
        assert learns or torch.equal(weigh(third, losses_at(step, device), step), wanted)
        for made in (first, second, third):
            feed(made, step)
    first.reset()
    assert torch.equal(weigh(first, losses_at(0, device)), weigh(WEIGHTINGS[name]().to(device), losses_at(0, device)))


@every_weighting
def test_absent_tasks(name, device):
    made = trained(name, device)
    before = copy.deepcopy(made.state_dict())
    values = losses_at(3, device)
    losses = [values[0].requires_grad_(), None, values[2].requires_grad_()]
    total = weigh(made, losses)
    assert total.isfinite()
    again = trained(name, device)
    assert torch.equal(weigh(again, values[[0, 2]].detach(), tasks=(0, 2)), total)
    if name not in ("Random", "ReLoBRaLo"):  # which draw numbers
        in_turn, backwards = (trained(name, device)(values.detach()[list(t)], tasks=t) for t in ((0, 1, 2), (2, 1, 0)))
        assert torch.allclose(in_turn, backwards, rtol=1e-6)
    feed_losses = losses_at(4, device)
    if not name.startswith("DWA"):
        made.update(losses=[feed_losses[0], None, feed_losses[2]], metrics=[0.5, None, 0.7])
    for key, value in made.state_dict().items():
        if value.dim() == 1 and name != "DWA, window":  # a window ends for all tasks
            assert torch.equal(value[1].nan_to_num(nan=-7), before[key][1].nan_to_num(nan=-7)), key


@every_weighting
def test_losses_that_are_not_finite_change_no_state(name, device):
    made = trained(name, device)
    before = copy.deepcopy(made.state_dict())
    values = losses_at(3, device)
    values[1] = torch.nan
    result = weigh(made, values)
    # A task at weight 0 still brings its NaN along: the step is to be skipped.
    assert result.isnan()
    made.update(losses=values, metrics=values)
    for key, value in made.state_dict().items():
        if key in ("time", "calls", "sums", "counts") or name.startswith("DWA"):
            continue  # time goes on; an epoch's mean leaves the loss out
        unchanged = value[1] if value.dim() else value
        old = before[key][1] if value.dim() else before[key]
        assert torch.equal(unchanged.nan_to_num(nan=-7), old.nan_to_num(nan=-7)), key
    assert weigh(made, losses_at(4, device)).isfinite()


@every_weighting
def test_evaluation_moves_no_state(name, device):
    made = trained(name, device).eval()
    before = copy.deepcopy(made.state_dict())
    drawn = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else ())
    made(losses_at(3, device))
    now = torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else ())
    assert all(map(torch.equal, drawn, now))
    for key, value in made.state_dict().items():
        assert torch.equal(value.nan_to_num(nan=-7), before[key].nan_to_num(nan=-7)), key


@every_weighting
def test_half_precision_losses_are_weighed_in_float32(name, device):
    with torch.autocast(device, dtype=torch.bfloat16):
        p = torch.ones(4, 4, device=device, requires_grad=True)
        values = [((p @ p).mean() * factor).to(torch.bfloat16) for factor in (0.3, 0.5, 0.7)]
        total = weigh(trained(name, device), values)
    assert total.dtype == torch.float32
    total.backward()
    assert p.grad.isfinite().all()
    exact = weigh(trained(name, device), torch.stack(values).detach().float())
    assert torch.allclose(total, exact)


@every_weighting
def test_compiles_to_one_graph(name, device):
    eager, compiled = trained(name, device), trained(name, device)
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in (3, 4):
        values = losses_at(step, device).requires_grad_()
        total = call(values)
        if name not in ("Random", "ReLoBRaLo"):  # which draw numbers
            assert torch.allclose(total, eager(values), rtol=1e-6)
        (gradient,) = torch.autograd.grad(total, values)
        assert gradient.isfinite().all()


# name -> what the weights of K present tasks add up to
SHARES = {
    "Mean": lambda K: 1,
    "InverseSampleSize": lambda K: K,
    "ClassBalanced": lambda K: K,
    "Random": lambda K: 1,
    "InversePerformance": lambda K: K,
    "DWA": lambda K: K,
    "SoftAdapt": lambda K: 1,
    "SoftAdapt, loss_weighted": lambda K: 1,
    "FAMO": lambda K: 1,
    "PriorityTask": lambda K: 1,
}


@pytest.mark.parametrize("name", SHARES)
@settings(deadline=None, max_examples=50)
@given(
    history=st.lists(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5),
    absent=st.sampled_from([None, 0, 2]),
)
def test_weights_are_positive_shares_whatever_the_losses(name, history, absent):
    made = WEIGHTINGS[name]()
    for losses in history:
        values = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
        total = made([value if k != absent else None for k, value in enumerate(values.unbind())])
        (weights,) = torch.autograd.grad(total, values)
        feed(made, 1)
    present = 3 - (absent is not None)
    assert weights.sum().item() == pytest.approx(SHARES[name](present), rel=1e-6)
    assert (weights >= 0).all()
    assert absent is None or weights[absent] == 0


class NothingWaits(TorchDispatchMode):
    """Refuses what would make a GPU wait: a number read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@every_weighting
def test_nothing_waits_for_a_gpu(name, monkeypatch, device):
    made = trained(name, device)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as if elsewhere than on the CPU
    p = torch.nn.Parameter(torch.linspace(0.1, 1, 5, device=device))
    losses = [(p - k).square().mean() + 0.2 for k in range(3)]
    feedback = losses_at(4, device)
    with NothingWaits():
        made([losses[0], None, losses[2]])
        made(losses).backward()
        made.update(losses=feedback, metrics=1 / (1 + feedback))


NOT_TAKEN = [(name, wrong) for name in OF_POSITIVE for wrong in (0.0, -1.5) if wrong or name not in TAKE_ZERO]


@pytest.mark.parametrize(("name", "wrong"), NOT_TAKEN)
def test_losses_that_must_be_positive(name, wrong, monkeypatch, device):
    made = trained(name, device)
    values = losses_at(3, device)
    values[1] = wrong
    if device == "cpu":
        with pytest.raises(ValueError, match=rf": the loss of task 1 is {wrong:g}, expected a number above"):
            weigh(made, values)
    before = copy.deepcopy(made.state_dict())
    # Where to look would wait: NaN, and a count.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    values.requires_grad_()
    total = weigh(made, values)
    assert total.isnan()
    assert torch.autograd.grad(total, values)[0].isnan().any()
    assert made.diagnostics() == {"nonpositive": 1}
    for key, value in made.state_dict().items():
        if key != "nonpositive":
            assert torch.equal(value.nan_to_num(nan=-7), before[key].nan_to_num(nan=-7)), key
    made.reset()
    assert made.diagnostics() == {"nonpositive": 0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.DWA(0), "DWA: num_tasks is 0, expected an integer of at least 1"),
        (lambda: weighting.DWA(3, temperature=0), "DWA: temperature is 0, expected a number above 0"),
        (lambda: weighting.DWA(3, window=0), "DWA: window is 0, expected an integer of at least 1 or None"),
        (lambda: weighting.DWA(3)(torch.ones(2)), "DWA: got 2 losses, expected 3 as num_tasks says"),
        (lambda: weighting.DWA(3)(torch.ones(2), tasks=(0, 3)), "DWA: got task 3, expected 3 tasks as num_tasks says"),
        (lambda: weighting.Sum()(torch.ones(2, 2)), r"Sum: losses is a tensor of shape \[2, 2\], expected \[K\]"),
        (lambda: weighting.Sum()([torch.ones(2)]), r"Sum: loss 0 has shape \[2\], expected a scalar Tensor or None"),
        (lambda: weighting.Sum()([1.0]), "Sum: loss 0 is a float, expected a scalar Tensor or None"),
        (lambda: weighting.Sum()([None, None]), "Sum: got 2 losses, none of them present"),
        (lambda: weighting.Sum()(torch.ones(3), tasks=(0, 1)), "Sum: got 3 losses and 2 tasks, expected equal numbers"),
        (lambda: weighting.Constant(2), "Constant: weights is 2, expected n finite numbers"),
        (lambda: weighting.InverseSampleSize(torch.tensor([0, 5])), r"InverseSampleSize: sample_sizes is \[0, 5\]"),
        (lambda: weighting.ClassBalanced(torch.ones(2), beta=1.0), r"ClassBalanced: beta is 1.0, expected .* \[0, 1\)"),
        (lambda: weighting.LossRescaling(2, by="last"), "LossRescaling: by is 'last', expected 'first', 'mean' or"),
        (lambda: weighting.InversePerformance(2).update(), "InversePerformance: metrics is None, expected the tasks'"),
        (lambda: weighting.FAMO(2).update(), "FAMO: losses is None, expected the losses after the step"),
        (lambda: weighting.FAMO(2, torch.ones(3)), r"FAMO: min_losses has shape \[3\], expected \[2\]"),
        (lambda: weighting.UW(2, [True]), "UW: classification has 1 entries, expected 2 as num_tasks says"),
        (lambda: weighting.STCH(0), "STCH: mu is 0, expected a number above 0"),
        (lambda: weighting.STCH(1.0, torch.ones(2, 2)), r"STCH: weights has shape \[2, 2\], expected \[n\]"),
        (lambda: weighting.STCH(1.0, torch.ones(2), torch.ones(3)), "STCH: reference has 3 entries, expected 2 as for"),
        (lambda: weighting.PBI(1.0, torch.ones(2))(torch.ones(3)), "PBI: got 3 losses, expected 2 as num_tasks says"),
        (lambda: weighting.CurriculumSchedule([]), r"CurriculumSchedule: starts is \[\], expected n finite numbers"),
        (lambda: weighting.AnnealingSchedule([1], [1, 2], 3), "AnnealingSchedule: end has 2 entries, expected 1 as"),
        (lambda: weighting.AnnealingSchedule([0], [1], 3, "exponential"), "AnnealingSchedule: a weight is not"),
        (lambda: weighting.PriorityTask(2, task=2), "PriorityTask: task is 2, expected one of 2"),
        (lambda: weighting.FreezeConverged(2, patience=0), "FreezeConverged: patience is 0, expected an integer"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_backward_refuses_what_is_no_weighting(device):
    p = torch.nn.Parameter(torch.ones(2, device=device))
    with pytest.raises(TypeError, match=r"backward: weighting is a str, expected a mtlfast.weighting.LossWeighting"):
        mtlfast.backward([p.sum()], Sum(), shared=[p], weighting="DWA")
    with pytest.raises(ValueError, match="DWA: got 1 losses, expected 2 as num_tasks says"):
        mtlfast.backward([p.sum()], Sum(), shared=[p], weighting=weighting.DWA(2))
    assert p.grad is None


def test_an_absent_task_and_surgery(device):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0], device=device))
    uncertainty = weighting.UW(3).to(device)
    losses = [p[0], None, 3 * p[1]]
    result = mtlfast.backward(losses, PCGrad(), shared=[p], weighting=uncertainty)
    assert torch.allclose(result.loss_weights.cpu(), torch.tensor([0.5, 0.5]))
    assert torch.allclose(p.grad.cpu(), torch.tensor([0.5, 1.5]))
    # d/ds of 1/2 exp(-s) L + 1/2 s; task 1 is absent.
    assert torch.allclose(uncertainty.log_var.grad.cpu(), torch.tensor([0.0, 0.0, -2.5]))


def test_the_table_has_every_weighting_and_says_what_it_keeps():
    listed = [method for methods in weighting.FAMILIES.values() for method in methods]
    assert set(listed) == {type(make()) for make in WEIGHTINGS.values()}
    for method in listed:
        made = next(make() for make in WEIGHTINGS.values() if type(make()) is method)
        fixed = {"nonpositive", "task_weights", "preferences", "origin", "factors", "starts", "start", "end"}
        fixed.add("min_losses")
        kept = [name for name in made.state_dict() if name not in fixed]
        assert bool(method.keeps) == bool(kept), (method, kept)
    for alias in ("Equal", "RandomLossWeighting", "DynamicWeightAverage", "UncertaintyWeighting", "SmoothTchebycheff"):
        assert getattr(weighting, alias) in listed


@pytest.mark.parametrize("name", training.__all__)
def test_what_moved_to_training_can_still_be_imported_from_here(name):
    assert getattr(weighting, name) is getattr(training, name)
    assert name not in weighting.__all__
