"""`SurgeryOptimizer`: training with it is bitwise training with `mtlfast.backward` and the bare optimizer."""

import copy
import itertools
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mtlfast
from mtlfast.aggregation import MGDA, PCGrad
from mtlfast.training import _surgery_optimizer
from mtlfast.weighting import UW

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


class Model(nn.Module):
    """Three tasks whose gradients of the trunk conflict."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.to(device)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        return [(head(features) + (-2) ** k * x[:, :1]).square().mean() for k, head in enumerate(self.heads)]


class Run:
    """A training, with a SurgeryOptimizer or by hand. Both draw the same numbers."""

    def __init__(self, wrapped: bool, make: Callable[..., Optimizer], device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.wrapped, self.device = wrapped, device
        self.model, self.aggregator = Model(device), PCGrad(generator=torch.Generator(device).manual_seed(1))
        self.data = torch.randn(20, 16, 4, device=device)
        self.bare = make(self.model.parameters())
        self.optimizer = self.bare
        if wrapped:
            self.optimizer = mtlfast.SurgeryOptimizer(self.bare, self.aggregator, shared=self.model.trunk)

    def backward(self, losses: Any, **options: Any) -> mtlfast.StepResult:
        if self.wrapped:
            return self.optimizer.backward(losses, **options)
        return mtlfast.backward(losses, self.aggregator, shared=self.model.trunk, **options)

    def train(self, steps: range = range(20), scheduler: Any = None) -> "Run":
        for step in steps:
            self.optimizer.zero_grad()
            result = self.backward(self.model(self.data[step]))
            self.optimizer.step()
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(result.losses.sum())
            elif scheduler is not None:
                scheduler.step()
        return self

    def train_scaled(self, scaler: torch.amp.GradScaler, unscale: bool) -> "Run":
        for x in self.data:
            self.optimizer.zero_grad()
            with torch.autocast(self.device, dtype=torch.float16):
                losses = self.model(x)
            scale = scaler.scale(torch.ones((), device=self.device))
            self.backward([scaler.scale(loss) for loss in losses], loss_scale=scale)
            if unscale:
                scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=0.5)
            scaler.step(self.optimizer)
            scaler.update()
        return self


def assert_equal(one: Any, other: Any) -> None:
    """Bitwise, through dicts and lists."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def assert_same_end(one: Run, other: Run) -> None:
    assert_equal(one.model.state_dict(), other.model.state_dict())
    assert_equal(one.optimizer.state_dict(), other.optimizer.state_dict())
    start = Run(False, torch.optim.SGD, one.device).model
    assert not torch.equal(one.model.trunk[0].weight, start.trunk[0].weight)


def both(make: Callable[..., Optimizer], device: str = "cpu") -> tuple[Run, Run]:
    return Run(True, make, device), Run(False, make, device)


def surgery(optimizer: Optimizer, **given: Any) -> mtlfast.SurgeryOptimizer:
    return mtlfast.SurgeryOptimizer(optimizer, PCGrad(), **given)


def sgd(**given: Any) -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, **given)


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


def test_state_dicts_of_distributed_checkpoint():
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    one, other = both(OPTIMIZERS["AdamW, foreach"])
    one.train(range(5))
    saved = state_dict.get_optimizer_state_dict(one.model, one.optimizer)
    state_dict.set_optimizer_state_dict(other.model, other.optimizer, saved)
    assert_equal(other.optimizer.state_dict(), one.optimizer.state_dict())


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


def test_a_generator_of_shared_parameters_lasts():
    ends = []
    for shared in (Model.parameters, lambda trunk: list(trunk.parameters()), nn.Module.named_parameters, lambda t: t):
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


def test_under_accelerate():
    accelerate = pytest.importorskip("accelerate")
    one, other = both(OPTIMIZERS["AdamW, foreach"])
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(one.model, one.optimizer)
    for x in one.data:
        optimizer.zero_grad()
        optimizer.optimizer.backward(model(x))
        optimizer.step()
    assert_same_end(one, other.train())


def test_accelerates_optimizer_sees_that_its_scaler_skips_a_step():
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    run, scaler = Run(True, OPTIMIZERS["AdamW, foreach"]), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(run.optimizer, scaler=scaler)
    skipped, weights = [], [run.model.trunk[0].weight.detach().clone()]
    for factor in (1, float("inf"), 1):
        optimizer.zero_grad()
        run.backward([scaler.scale(factor * loss) for loss in run.model(run.data[0])])
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        weights.append(run.model.trunk[0].weight.detach().clone())
    assert skipped == [False, True, False]
    assert [torch.equal(one, other) for one, other in itertools.pairwise(weights)] == skipped


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers:UserWarning")
def test_under_lightning():
    lightning = pytest.importorskip("lightning")
    one, other = both(OPTIMIZERS["SGD with momentum"])

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = one.model

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.backward(self.model(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            return [one.optimizer], [lr_scheduler.StepLR(one.optimizer, step_size=1, gamma=0.5)]

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(one.data, batch_size=None))
    scheduler = lr_scheduler.StepLR(other.optimizer, step_size=1, gamma=0.5)
    other.optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(other.model.parameters(), max_norm=0.5) and None
    )
    for _ in range(2):
        other.train()
        scheduler.step()
    assert_same_end(one, other)


def test_under_fabric():
    lightning = pytest.importorskip("lightning")
    one, other = both(OPTIMIZERS["SGD with momentum"])
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(one.model, one.optimizer)
    for x in one.data:
        optimizer.zero_grad()
        optimizer.backward(model(x))
        optimizer.step()
    assert_same_end(one, other.train())


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
