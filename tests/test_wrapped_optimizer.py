"""What `SurgeryOptimizer` passes on to the optimizer that it wraps, and what it refuses."""

import copy
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
from surgery_runs import sgd, surgery
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mtlfast
from mtlfast.aggregation import MGDA, PCGrad
from mtlfast.training import _surgery_optimizer
from mtlfast.weighting import UW


def test_a_scheduler_still_warns_where_no_step_was_taken_before_it():
    optimizer = surgery(sgd())
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.filterwarnings("error")
def test_a_scheduler_that_was_made_for_the_bare_optimizer():
    bare = sgd()
    scheduler = lr_scheduler.StepLR(bare, step_size=1)
    surgery(bare).step()
    scheduler.step()


class TakesScaler(torch.optim.SGD):
    """An optimizer that unscales by itself, by the protocol that came before `grad_scale` and `found_inf`."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= grad_scaler.get_scale()
        return super().step(closure)


@pytest.mark.parametrize("again", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_that_takes_the_scaler_gets_it(scheduled, again):
    optimizer = again(surgery(TakesScaler([nn.Parameter(torch.ones(2))], lr=1.0)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    if scheduled:
        lr_scheduler.StepLR(optimizer, step_size=1)
    (w,) = optimizer.param_groups[0]["params"]
    mtlfast.backward([scaler.scale(w[0]), scaler.scale(w[1])], PCGrad(), shared=[w])
    with pytest.warns(FutureWarning, match="GradScaler is going to stop passing itself"):
        scaler.step(optimizer)
    assert torch.equal(w, torch.zeros(2))


def test_it_is_an_optimizer_with_the_state_of_another():
    bare = sgd(momentum=0.9)
    optimizer = surgery(bare)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.optimizer is bare
    for name in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, name) is getattr(bare, name)
        assert name not in vars(optimizer)
        setattr(optimizer, name, other := copy.copy(getattr(bare, name)))
        assert getattr(bare, name) is other
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    assert [group["lr"] for group in bare.param_groups] == [0.1, 0.5]
    (w,) = bare.param_groups[0]["params"]
    w.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(w.grad, torch.zeros(2))
    optimizer.zero_grad()
    assert w.grad is None


HOOKS = {
    "step_pre": lambda o: o.step(),
    "step_post": lambda o: o.step(),
    "state_dict_pre": lambda o: o.state_dict(),
    "state_dict_post": lambda o: o.state_dict(),
    "load_state_dict_pre": lambda o: o.load_state_dict(o.state_dict()),
    "load_state_dict_post": lambda o: o.load_state_dict(o.state_dict()),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("of_wrapper", [True, False])
def test_hooks_are_called_once(of_wrapper, kind):
    bare = sgd()
    optimizer = surgery(bare)
    called = []
    register = getattr(optimizer if of_wrapper else bare, f"register_{kind}_hook")
    handle = register(lambda given, *_: called.append(given))
    HOOKS[kind](optimizer)
    assert len(called) == 1
    assert called[0] is bare
    handle.remove()
    HOOKS[kind](optimizer)
    assert len(called) == 1


def test_hooks_see_the_arguments_of_the_bare_optimizer_and_may_change_them():
    bare = sgd()
    optimizer, seen = surgery(bare), []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((*args, lambda: 2.0), kwargs))
    optimizer.register_step_post_hook(lambda _, args, kwargs: seen.append((args[0], kwargs)))
    assert optimizer.step() == 2.0
    assert seen == [(bare, {})]
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "more": 1})
    assert optimizer.state_dict()["more"] == 1


def test_hooks_of_all_optimizers_are_called_once():
    optimizer, called = surgery(sgd()), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("before")),
        register_optimizer_step_post_hook(lambda *_: called.append("after")),
    ]
    try:
        optimizer.step()
        pickle.loads(pickle.dumps(optimizer)).step()
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["before", "after"] * 2


class Unusual(torch.optim.SGD):
    """An optimizer whose step takes and returns more, and that has modes."""

    training = True

    def step(self, closure=None, *, times=1):
        for _ in range(times):
            super().step(closure)
        return "done", times

    def eval(self):
        self.training = False


def test_arguments_and_results_of_step_and_other_attributes_are_passed_on():
    bare = Unusual([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer = surgery(bare)
    assert optimizer.step(times=3) == ("done", 3)
    optimizer.eval()
    assert bare.training is False
    assert optimizer.training is False
    optimizer.training = True
    assert bare.training is True
    assert "training" not in vars(optimizer)
    del optimizer.training
    assert "training" not in vars(bare)
    assert not hasattr(optimizer, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        del optimizer.no_such_thing
    optimizer._cuda_graph_capture_health_check = None  # of Optimizer, which the wrapped optimizer's step asks
    assert bare._cuda_graph_capture_health_check is None
    optimizer.__class__ = type("Renamed", (mtlfast.SurgeryOptimizer,), {})
    assert type(bare) is Unusual
    assert type(optimizer).__name__ == "Renamed"


def test_a_replaced_step_stays_with_the_wrapper():
    bare, called = sgd(), []
    optimizer = surgery(bare)
    before = optimizer.step

    def counted(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        called.append(self)
        return before(*args, **kwargs)

    optimizer.step = MethodType(counted, optimizer)
    optimizer.step()
    assert called == [optimizer]
    assert "step" not in vars(bare)
    del optimizer.step
    optimizer.step()
    assert len(called) == 1


def test_backward_gets_the_arguments_and_its_result_is_returned(monkeypatch):
    seen = []
    monkeypatch.setattr(_surgery_optimizer, "backward", lambda *args, **kwargs: seen.append((args, kwargs)) or "result")
    aggregator, weighting, losses = PCGrad(), UW(3), [torch.ones(())]
    optimizer = mtlfast.SurgeryOptimizer(sgd(), aggregator, weighting=weighting)
    assert optimizer.backward(losses, loss_scale=0.5, retain_graph=True) == "result"
    optimizer.aggregator = other = MGDA()
    optimizer.backward(losses)
    assert seen == [
        ((losses, aggregator), {"shared": None, "weighting": weighting, "loss_scale": 0.5, "retain_graph": True}),
        ((losses, other), {"shared": None, "weighting": weighting}),
    ]


def test_repr_names_what_is_in_it():
    text = repr(surgery(sgd(), weighting=UW(3)))
    assert text.startswith("SurgeryOptimizer(aggregator=PCGrad(")
    assert "weighting=UW(" in text
    assert "optimizer=SGD (\n" in text


@pytest.mark.parametrize(
    ("optimizer", "aggregator", "given", "message"),
    [
        (
            torch.optim.AdamW,
            PCGrad(),
            {},
            r"optimizer is the class AdamW, expected an instance, as AdamW\(model.parameters\(\)\) makes one$",
        ),
        ([], PCGrad(), {}, r"optimizer is a list, expected a torch\.optim\.Optimizer$"),
        (None, PCGrad(), {}, r"optimizer is a NoneType, expected a torch\.optim\.Optimizer$"),
        (sgd(), PCGrad, {}, r"aggregator is the class PCGrad, expected an instance, as PCGrad\(\) makes one$"),
        (sgd(), "PCGrad", {}, r"aggregator is a str, expected a mtlfast\.aggregation\.Aggregator$"),
        (PCGrad(), sgd(), {}, r"aggregator is a SGD, expected a mtlfast\.aggregation\.Aggregator$"),
        (sgd(), PCGrad(), {"weighting": UW}, r"weighting is the class UW, expected an instance"),
        (sgd(), PCGrad(), {"weighting": 1.0}, r"weighting is a float, expected a mtlfast\.weighting\.LossWeighting$"),
    ],
)
def test_bad_arguments(optimizer, aggregator, given, message):
    with pytest.raises(TypeError, match=f"^SurgeryOptimizer: {message}"):
        mtlfast.SurgeryOptimizer(optimizer, aggregator, **given)
