"""What `jacobian="implicit"` and "auto" choose for each shared parameter, the reasons, and what they refuse."""

import gc
import weakref

import pytest
import torch
from elementwise import METHODS as ELEMENTWISE
from implicit_steps import Tasks, assert_exact, mlp, step
from passes import Counted
from torch import nn

import mtlfast
from mtlfast import SurgeryOptimizer, TaskGradientAccumulator
from mtlfast.aggregation import DBMTL, Constant, GradDrop, MoCo, PCGrad, Sum, UPGrad
from mtlfast.jacobian import _plan

TABLE = """\
implicit: 2 of 5 shared parameters, 61% fewer FLOPs for their gradients
batched backward passes: all losses meet at one tensor
layer     rows  way       MFLOP  ordinary   MiB  reason
0.weight     4  implicit    0.1       0.2  0.00  fewer FLOPs
0.bias          ordinary                   0.00  its shape [96] is no matrix
1.weight        ordinary                   0.00  its shape [96] is no matrix
1.bias          ordinary                   0.00  its shape [96] is no matrix
2.weight     4  implicit    0.1       0.2  0.00  fewer FLOPs"""


@pytest.mark.native
def test_the_table():
    trunk = nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 96, bias=False))
    model, x = Tasks(trunk, 96, 3), torch.randn(4, 96)
    result, _ = step(lambda: model.losses(x), model, "implicit", shared=trunk)
    assert str(result.plan) == TABLE
    first = result.plan.layers[0]
    assert (first.rows, first.ordinary_flops) == (4, 2 * 3 * 4 * 96 * 96)
    assert first.flops == 2 * (4 * 4 * (96 + 3 * 96) + 4 * 96 * 96)
    assert first.memory == 3 * 4 * 96 * 4
    assert result.plan.layers[1].memory == 3 * 96 * 4


def test_the_stored_way_has_no_table():
    model, x = Tasks(mlp(8, 1), 8, 2), torch.randn(2, 8)
    result, _ = step(lambda: model.losses(x), model, "stored", shared=model.trunk)
    assert str(result.plan) == "stored"


class Uses(nn.Module):
    """A trunk with one weight [16, 16], and one way to use it."""

    def __init__(self, use):
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(16, 16) / 4), use

    def forward(self, x):
        return self.use(x, self.weight)


class OneMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


def hooked(x, weight):
    y = x @ weight.T
    y.register_hook(lambda g: g)
    return y


F = nn.functional
REASONS = {
    "fewer FLOPs": lambda x, w: x @ w.T,
    "UnsqueezeBackward0 uses it": lambda x, w: torch.bmm(x[None], w[None])[0],
    "PowBackward0 uses it": lambda x, w: x @ w.T + w.square().sum(),
    "AddmmBackward0 multiplies by 2": lambda x, w: torch.addmm(x, x, w, alpha=2),
    "MmBackward0 has a hook": hooked,
    "OneMatmulBackward uses it": OneMatmul.apply,
    "it is used in two forms, embedding and linear": lambda x, w: F.embedding(torch.arange(4), w) + x @ w.T,
    "it is used in two forms, linear and transposed": lambda x, w: x @ w.T @ w,
    "it is a bias": lambda x, w: torch.addmm(w, torch.eye(16)[:, :4].to(x), x)[:4],
    "4 rows are fewer than 16 entries": lambda x, w: x + F.embedding(torch.tensor([1, 1, 3, 0]), w),
    "20 rows against 16 entries": lambda x, w: x + F.embedding(torch.arange(20) % 16, w)[:4],
    "the embedding scales gradients by frequency": lambda x, w: (
        x + F.embedding(torch.arange(4), w, scale_grad_by_freq=True)
    ),
    "the ordinary way takes fewer FLOPs": lambda x, w: (torch.cat([x] * 10) @ w.T)[:4],
}


@pytest.mark.native
@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_for_a_way_and_that_it_is_exact(reason):
    trunk = Uses(REASONS[reason])
    model, x = Tasks(trunk, 16, 3).double(), torch.randn(4, 16).double()
    (layer,) = assert_exact(lambda: model.losses(x), model, shared=trunk).plan.layers
    assert layer.reason == reason
    assert layer.way == ("implicit" if reason.startswith(("fewer", "4 rows")) else "ordinary")


@pytest.mark.native
def test_a_parameter_that_no_task_reaches_and_one_with_a_hook_of_its_own():
    trunk = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(3)]).double()
    trunk[1].weight.register_hook(lambda g: 2 * g)
    model, x = Tasks(nn.Sequential(*trunk[:2]), 16, 3).double(), torch.randn(4, 16).double()
    first, second, third = assert_exact(lambda: model.losses(x), model, shared=trunk).plan.layers
    assert second.reason == "it has a tensor hook"
    assert third.reason == "no task reaches it"
    assert first.way == "implicit"


def plans(module):
    return _plan._cache[next(module.parameters())]


@pytest.mark.native
@pytest.mark.usefixtures("every_size")
def test_a_structure_keeps_its_plan():
    model = Tasks(mlp(16, 2), 16, 3)
    x = torch.randn(4, 16)
    step(lambda: model.losses(x), model, "implicit", shared=model.trunk)
    (chosen,) = plans(model.trunk).values()
    for _ in range(3):
        step(lambda: model.losses(x + 1), model, "implicit", shared=model.trunk)
    assert list(plans(model.trunk).values()) == [chosen]
    assert next(iter(plans(model.trunk).values())) is chosen
    others = {
        "tasks": lambda: step(lambda: model.losses(x)[:2], model, "implicit", shared=model.trunk),
        "rows": lambda: step(lambda: model.losses(x[:3]), model, "implicit", shared=model.trunk),
        "mode": lambda: step(lambda: model.losses(x), model, "auto", shared=model.trunk),
        "a node": lambda: step(lambda: model.losses(x.requires_grad_()), model, "implicit", shared=model.trunk),
        "budget": lambda: step(lambda: model.losses(x), model, "auto", shared=model.trunk, memory_budget=10**6),
    }
    for count, (name, other) in enumerate(others.items()):
        other()
        assert len(plans(model.trunk)) == count + 2, name


@pytest.mark.native
def test_training_and_evaluation_have_a_plan_each():
    trunk = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)).double()
    model, x = Tasks(trunk, 16, 3).double(), torch.randn(4, 16).double()
    seen = []
    for training in (True, False, True, False):
        model.train(training)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def losses(before=before):
            model.load_state_dict(before, strict=False)
            return model.losses(x)

        assert_exact(losses, model, shared=trunk)
        seen.append(len(plans(trunk)))
    assert seen == [1, 2, 2, 2]


@pytest.mark.native
def test_few_plans_are_kept_and_none_for_a_model_that_is_gone():
    model = Tasks(mlp(16, 1), 16, 2)
    for rows in range(1, _plan.MOST_PLANS + 4):
        mtlfast.backward(model.losses(torch.randn(rows, 16)), Sum(), shared=model.trunk, jacobian="implicit")
        assert len(plans(model.trunk)) == (rows - 1) % _plan.MOST_PLANS + 1
    gc.collect()
    gone, count = weakref.ref(next(model.trunk.parameters())), len(_plan._cache)
    del model
    gc.collect()
    assert gone() is None
    assert len(_plan._cache) == count - 1


@pytest.mark.native
@pytest.mark.usefixtures("every_size")
def test_a_budget_turns_layers_to_the_way_of_less_memory():
    # Of 12 rows at a width of 16 the implicit way keeps less, but takes more FLOPs.
    trunk = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 64, bias=False)).double()
    model, x = Tasks(trunk, 64, 2).double(), torch.randn(12, 16).double()
    stored = 8 * 2 * 16 * (16 + 64)
    kept = [8 * 2 * 12 * 16, 8 * 2 * 12 * 64]
    ways = {
        None: ["ordinary", "ordinary"],
        stored: ["ordinary", "ordinary"],
        stored - 1: ["ordinary", "implicit"],
        8 * 2 * 16 * 16 + kept[1] - 1: ["implicit", "implicit"],
        sum(kept): ["implicit", "implicit"],
    }
    for budget, expected in ways.items():
        plan = assert_exact(lambda: model.losses(x), model, "auto", shared=trunk, memory_budget=budget).plan
        assert [layer.way for layer in plan.layers] == expected
        assert plan.way == ("implicit" if "implicit" in expected else "stored")
        assert budget is None or sum(layer.memory for layer in plan.layers) <= budget
        assert ("more FLOPs for their gradients" in plan.reason) == ("implicit" in expected)
        turned = [layer.reason for layer in plan.layers if layer.way == "implicit"]
        assert all(reason == "less memory, as memory_budget asks for" for reason in turned)
    with pytest.raises(
        ValueError,
        match=rf"memory_budget is 9 bytes, expected at least {sum(kept)}, which the gradients of 2 tasks take$",
    ):
        step(lambda: model.losses(x), model, "auto", shared=trunk, memory_budget=9)
    assert all(p.grad is None for p in model.parameters())


BUDGET = "expected a number of bytes above 0, or None$"
BAD = {
    "another way": ({"jacobian": "x"}, "jacobian is 'x', expected 'stored', 'implicit', 'auto' or 'mixing'$"),
    "no name": ({"jacobian": 1}, "jacobian is 1, expected"),
    "no bytes": ({"jacobian": "auto", "memory_budget": 0}, f"memory_budget is 0, {BUDGET}"),
    "less": ({"jacobian": "implicit", "memory_budget": -1}, f"memory_budget is -1, {BUDGET}"),
    "a truth": ({"jacobian": "auto", "memory_budget": True}, f"memory_budget is True, {BUDGET}"),
    "a string": ({"jacobian": "auto", "memory_budget": "1"}, f"memory_budget is '1', {BUDGET}"),
    "a float": ({"jacobian": "auto", "memory_budget": 1e6}, rf"memory_budget is 1000000\.0, {BUDGET}"),
    "nothing to choose": ({"jacobian": "stored", "memory_budget": 1}, "memory_budget= beside jacobian='stored'"),
    "by default": ({"memory_budget": 1}, "memory_budget is 1 bytes, expected at least"),
}


def model_and_losses():
    Counted.passes = 0
    model, x = Tasks(mlp(16, 2), 16, 2), torch.randn(3, 16)
    return model, [Counted.apply(loss) for loss in model.losses(x)]


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options, sentence = BAD[name]
    model, losses = model_and_losses()
    with pytest.raises(ValueError, match=f"^backward: .*{sentence}"):
        mtlfast.backward(losses, Sum(), shared=model.trunk, **options)
    assert Counted.passes == 0
    assert all(p.grad is None for p in model.parameters())


def accumulated(model, losses):
    accumulator = TaskGradientAccumulator(model.trunk)
    accumulator.add(losses)
    return {"losses": accumulator, "shared": None}


OTHER_WAYS = {
    "closures": lambda model, losses: {"losses": [lambda loss=loss: loss for loss in losses]},
    "an accumulator": accumulated,
    "at": lambda model, losses: {"at": losses[0].detach().requires_grad_(), "shared": None},
    "second": lambda model, losses: {"second": losses},
}


@pytest.mark.parametrize("kind", OTHER_WAYS)
def test_implicit_is_for_losses_of_one_forward_pass(kind):
    model, losses = model_and_losses()
    options = {"losses": losses, "shared": model.trunk, **OTHER_WAYS[kind](model, losses)}
    Counted.passes, before = 0, [p.grad for p in model.parameters()]
    sentence = f'^backward: got jacobian="implicit" beside {kind}, expected losses of one forward pass$'
    with pytest.raises(ValueError, match=sentence):
        mtlfast.backward(**options, aggregator=Sum(), jacobian="implicit")
    assert Counted.passes == 0
    assert all(a is b for a, b in zip(before, [p.grad for p in model.parameters()], strict=True))


@pytest.mark.native
def test_a_method_that_needs_gradients_is_refused_before_any_pass_and_stores_under_auto():
    for make in [*ELEMENTWISE.values(), MoCo, DBMTL]:
        aggregator = make() if isinstance(make, type) else make.make()
        model, losses = model_and_losses()
        name = type(aggregator).__name__
        sentence = (
            f'^{name}: needs the task gradients themselves, but jacobian="implicit" does not make them, expected '
            'jacobian="stored"$'
        )
        with pytest.raises(TypeError, match=sentence):
            mtlfast.backward(losses, aggregator, shared=model.trunk, jacobian="implicit")
        assert Counted.passes == 0
        assert all(p.grad is None for p in model.parameters())
    model, losses = model_and_losses()
    torch.manual_seed(3)
    result = mtlfast.backward(losses, GradDrop(), shared=model.trunk, jacobian="auto", retain_graph=True)
    assert str(result.plan) == "stored: GradDrop needs the task gradients themselves"
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    mtlfast.backward(losses, GradDrop(), shared=model.trunk)
    assert all(torch.equal(a, p.grad) for a, p in zip(got, model.parameters(), strict=True))


@pytest.mark.native
def test_an_optimizer_passes_the_way_on():
    model, x = Tasks(mlp(32, 2), 32, 3), torch.randn(2, 32)
    optimizer = SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), PCGrad(order="fixed"), shared=model.trunk)
    for way, budget in (("implicit", None), ("auto", 10**9), ("stored", None)):
        result = optimizer.backward(model.losses(x), jacobian=way, memory_budget=budget)
        assert result.plan.way == ("stored" if way == "stored" else "implicit")
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.native
def test_a_storage_dtype_rounds_the_ordinary_parameters_alone():
    model, x = Tasks(mlp(32, 2), 32, 3), torch.randn(2, 32)
    (_, exact), (_, stored), (result, got) = (
        step(lambda: model.losses(x), model, way, shared=model.trunk, storage_dtype=dtype)
        for way, dtype in (("stored", None), ("stored", torch.bfloat16), ("implicit", torch.bfloat16))
    )
    assert {layer.way for layer in result.plan.layers} == {"implicit", "ordinary"}
    for layer, a, b, c in zip(result.plan.layers, exact, stored, got, strict=False):
        torch.testing.assert_close(c, a if layer.way == "implicit" else b, rtol=1e-5, atol=1e-6)
        assert (layer.way == "implicit") != torch.equal(b, c)


def test_a_method_that_decides_about_ranks_has_the_weights_of_the_stored_way():
    model, x = Tasks(mlp(16, 3), 16, 4).double(), torch.randn(3, 16).double()
    found = [step(lambda: model.losses(x), model, way, UPGrad(), model.trunk)[0].weights for way in ("stored", "auto")]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    constant = step(lambda: model.losses(x), model, "implicit", Constant([1.0, 0.0, 2.0, 0.0]), model.trunk)[0]
    assert constant.weights.tolist() == [1, 0, 2, 0]
