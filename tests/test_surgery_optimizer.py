"""Training with `SurgeryOptimizer` is bitwise training with `mtlfast.backward` and the bare optimizer."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from surgery_runs import OPTIMIZERS, Run, assert_equal, assert_same_end, both
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

import mtlfast
from mtlfast.aggregation import PCGrad
from mtlfast.weighting import UW


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_those_of_the_call_and_the_bare_optimizer(name, device):
    one, other = (run.train() for run in both(OPTIMIZERS[name], device))
    assert_same_end(one, other)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, gamma=0.8)], milestones=[5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, gamma=0.8)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=10),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["SGD with momentum", "AdamW, foreach"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind, name):
    runs = both(OPTIMIZERS[name])
    rates = []
    for run in runs:
        before = [(group["lr"], group.get("momentum")) for group in run.optimizer.param_groups]
        scheduler = SCHEDULERS[kind](run.optimizer)
        run.train(scheduler=scheduler)
        rates.append([(group["lr"], group.get("momentum")) for group in run.bare.param_groups])
        assert rates[-1] != before
    assert rates[0] == rates[1]
    assert_same_end(*runs)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_grad_scaler(name, unscale, device):
    runs = both(OPTIMIZERS[name], device)
    for run in runs:
        run.train_scaled(torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=4), unscale)
    assert_same_end(*runs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_grad_scaler_skips_a_step_that_overflows(name, device):
    run, scaler = Run(True, OPTIMIZERS[name], device), torch.amp.GradScaler(device, init_scale=2.0**120)
    before = copy.deepcopy(run.model.state_dict())
    run.train_scaled(scaler, unscale=False)
    assert_equal(run.model.state_dict(), before)
    assert scaler.get_scale() == 2.0**100


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_takes_a_closure(line_search, device):
    runs = both(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn=line_search), device)
    returned: list[list[Any]] = [[], []]
    for run, values in zip(runs, returned, strict=True):
        for x in run.data:

            def closure(run: Run = run, x: Tensor = x) -> Tensor:
                run.optimizer.zero_grad()
                return run.backward(run.model(x)).losses.sum()

            values.append(run.optimizer.step(closure))
    assert all(torch.equal(one, other) for one, other in zip(*returned, strict=True))
    assert_same_end(*runs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_state_dicts_are_the_wrapped_optimizers(first, name):
    whole = Run(False, OPTIMIZERS[name]).train()
    saved = Run(first, OPTIMIZERS[name]).train(range(10))
    resumed = Run(not first, OPTIMIZERS[name])
    resumed.model.load_state_dict(saved.model.state_dict())
    resumed.aggregator.load_state_dict(saved.aggregator.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    resumed.train(range(10, 20))
    assert_same_end(resumed, whole)


def test_hooks_that_step_away_and_back_as_sharpness_aware_minimization_does(device):
    runs = both(OPTIMIZERS["SGD with momentum"], device)
    for run in runs:
        parameters = list(run.model.parameters())

        def to_the_worst_near(_: Any, args: Any, kwargs: Any, run: Run = run, parameters: Any = parameters) -> None:
            x, there = kwargs.pop("at"), [0.1 * p.grad for p in parameters]
            with torch.no_grad():
                torch._foreach_add_(parameters, there)
            run.optimizer.zero_grad()
            run.backward(run.model(x))
            with torch.no_grad():
                torch._foreach_sub_(parameters, there)
            return (args, kwargs)

        run.optimizer.register_step_pre_hook(to_the_worst_near)
        for x in run.data:
            run.optimizer.zero_grad()
            run.backward(run.model(x))
            run.optimizer.step(at=x)
    assert_same_end(*runs)
    assert not torch.equal(
        runs[0].model.trunk[0].weight, Run(True, OPTIMIZERS["SGD with momentum"], device).train().model.trunk[0].weight
    )


def test_clipping_and_an_average_of_the_model(device):
    runs, averages = both(OPTIMIZERS["AdamW, foreach"], device), []
    for run in runs:
        average = swa_utils.AveragedModel(run.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        run.optimizer.register_step_pre_hook(
            lambda *_, run=run: nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=0.1) and None
        )
        run.optimizer.register_step_post_hook(lambda *_, run=run, average=average: average.update_parameters(run.model))
        run.train()
        averages.append(average.state_dict())
    assert_equal(*averages)
    assert averages[0]["n_averaged"] == 20
    assert_same_end(*runs)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_where_the_original_was(again):
    one, other = both(OPTIMIZERS["AdamW, foreach"])
    lr_scheduler.ConstantLR(one.optimizer, factor=1.0)  # it replaces step by a function that does not pickle
    one.train(range(10))
    other.train()
    model, optimizer = again((one.model, one.optimizer))
    for x in one.data[10:]:
        optimizer.zero_grad()
        optimizer.backward(model(x))
        optimizer.step()
    assert_equal(model.state_dict(), other.model.state_dict())
    assert optimizer.aggregator is not one.aggregator
    assert copy.copy(optimizer).optimizer is optimizer.optimizer


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_compiled_step_is_that_of_the_compiled_bare_optimizer(scheduled):
    runs = both(OPTIMIZERS["AdamW, foreach"])
    for run in runs:
        torch._dynamo.reset()
        if scheduled:
            scheduler = lr_scheduler.ExponentialLR(run.optimizer, gamma=0.9)
        step = torch.compile(run.optimizer.step, backend="eager")
        for x in run.data:
            run.optimizer.zero_grad()
            run.backward(run.model(x))
            step()
            if scheduled:
                scheduler.step()
    assert_same_end(*runs)


def test_what_a_weighting_learns(device):
    ends = []
    for wrapped in (True, False):
        run, weighting = Run(wrapped, OPTIMIZERS["SGD with momentum"], device), UW(3).to(device)
        run.bare.add_param_group({"params": weighting.parameters()})
        if wrapped:
            run.optimizer = mtlfast.SurgeryOptimizer(
                run.bare, run.aggregator, shared=run.model.trunk, weighting=weighting
            )
        for x in run.data:
            run.optimizer.zero_grad()
            run.backward(run.model(x), **({} if wrapped else {"weighting": weighting}))
            run.optimizer.step()
        ends.append({**run.model.state_dict(), **weighting.state_dict()})
    assert_equal(*ends)
    assert ends[0]["log_var"].ne(0).all()


def test_a_generator_of_shared_parameters_lasts():
    ends = []
    for shared in (
        nn.Module.parameters,
        lambda trunk: list(trunk.parameters()),
        nn.Module.named_parameters,
        lambda t: t,
    ):
        run = Run(True, OPTIMIZERS["SGD with momentum"])
        run.optimizer = mtlfast.SurgeryOptimizer(run.bare, run.aggregator, shared=shared(run.model.trunk))
        ends.append(run.train().model.state_dict())
    for end in ends[1:]:
        assert_equal(end, ends[0])


def test_a_refused_step_leaves_gradients_and_state():
    run = Run(True, OPTIMIZERS["SGD with momentum"]).train(range(3))
    state, gradients = run.aggregator.state_dict(), [p.grad.clone() for p in run.model.parameters()]
    state = copy.deepcopy(state)
    with pytest.raises(ValueError, match="backward: got 0 losses"):
        run.optimizer.backward([])
    with pytest.raises(TypeError, match="'no_such_option'"):
        run.optimizer.backward(run.model(run.data[0]), no_such_option=1)
    assert_equal(run.aggregator.state_dict(), state)
    assert_equal([p.grad for p in run.model.parameters()], gradients)


def test_what_says_itself_what_is_shared_takes_the_place_of_shared():
    trunk, heads = torch.nn.Linear(3, 4), [torch.nn.Linear(4, 1) for _ in range(2)]
    optimizer = mtlfast.SurgeryOptimizer(torch.optim.SGD(trunk.parameters(), lr=0.1), PCGrad(), shared=trunk)
    accumulator = mtlfast.TaskGradientAccumulator(trunk)

    def losses():
        features = trunk(torch.ones(2, 3))
        return features, [head(features).mean() for head in heads]

    accumulator.add(losses()[1])
    assert optimizer.backward(accumulator).plan.way == "accumulated"
    features, of_tasks = losses()
    assert optimizer.backward(of_tasks, at=features).plan.way == "features"
    assert optimizer.backward(losses()[1]).plan.way == "stored"
