"""What cannot be had from one pass over samples: refused by name, or computed in an ordinary way with the reason."""

import copy
import functools
import re

import pytest
import torch
from mixing_models import MIXINGS, Attention, D, Model, S, T, assert_same_grads, disjoint, rows, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mtlfast
from mtlfast.aggregation import Constant, Median, UPGrad
from mtlfast.jacobian import _probe

pytestmark = pytest.mark.native


def refusal(net: nn.Module, A: Tensor, losses=None, **more) -> str:
    """Expects that `jacobian="mixing"` refuses a step and writes nothing, and that "auto" gives the stored result.

    Returns:
        The reason of both, one sentence.
    """
    weights = Constant([float(1 + k) for k in range(len(A))])
    with pytest.raises(ValueError) as raised:
        step(net, A, weights, "mixing", losses, **more)
    found = {way: step(net, A, weights, way, losses, diagnostics=True, **more) for way in ("auto", "stored")}
    plan = found["auto"].step.plan
    reason = str(raised.value).removeprefix('backward: jacobian is "mixing", but ')
    assert plan.way in ("stored", "implicit")
    assert reason in plan.reason or "passes take fewer FLOPs" in plan.reason, plan.reason
    assert ". " not in reason
    assert "\n" not in reason
    torch.testing.assert_close(found["auto"].step.gram, found["stored"].step.gram, rtol=1e-12, atol=1e-12)
    assert_same_grads(found["auto"].grads, found["stored"].grads)
    return reason


class Through(nn.Module):
    """Linear layers with something between them."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(D, D), nn.Linear(D, D), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Experts(nn.Module):
    """The best of two experts for each row, whose choice is balanced over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 2), nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.router(x).softmax(-1)
        out = sum(gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return out, gates.mean(0).square().sum()


class Mixes(torch.autograd.Function):
    """Adds a little of the first row to every other one."""

    @staticmethod
    def forward(ctx, x):
        return x + 1e-6 * x[:1]

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g[0] += 1e-6 * g.sum(0)
        return g


class Alone(torch.autograd.Function):
    """A function of Python that keeps the rows apart."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def contrastive(net: Model) -> Tensor:
    features = F.normalize(net.trunk(net.given), dim=1)
    return F.cross_entropy(features @ features.mT / 0.1 - 1e3 * torch.eye(S), disjoint(S, S).roll(1), reduction="none")


def normalised(net: Model) -> Tensor:
    losses = net.losses()
    return (losses - losses.mean()) / losses.std()


def balanced(net: Model) -> Tensor:
    out, balance = net.trunk(net.given)
    return net.head(out).square().mean(1) + balance


def of_rows(between, *shape: int) -> Model:
    torch.manual_seed(0)
    net = Model(Through(between), rows(*shape, D)).double()
    net.given = net.given.double()
    return net


ORDER = torch.randperm(S, generator=torch.Generator().manual_seed(3))
MEETING = {
    "BatchNorm": (lambda: of_rows(nn.BatchNorm1d(D)), None, "AddmmBackward0|NativeBatchNormBackward0"),
    "BatchNorm without parameters": (lambda: of_rows(nn.BatchNorm1d(D, affine=False)), None, "samples meet"),
    "losses over their mean": (lambda: of_rows(nn.Tanh()), normalised, "samples meet in AddmmBackward0"),
    "a contrastive loss": (lambda: of_rows(nn.Tanh()), contrastive, "samples meet in AddmmBackward0"),
    "a function that mixes": (lambda: of_rows(Mixes.apply), None, "first.*: samples meet in AddmmBackward0"),
    "attention over the batch": (lambda: of_rows(Attention(None), 1), None, "samples meet in AddmmBackward0"),
    "rows in another order": (lambda: of_rows(lambda x: x[ORDER]), None, "first.*AddmmBackward0.*in their order"),
    "rows routed": (lambda: of_rows(lambda x: x.flatten(0, 1)[PLACES].view(S, T, D), T), None, "AddmmBackward0"),
    "a balancing loss": (lambda: experts(), balanced, "router.*: samples meet in AddmmBackward0"),
}
PLACES = torch.randperm(S * T, generator=torch.Generator().manual_seed(3))


def experts() -> Model:
    torch.manual_seed(0)
    net = Model(Experts(), rows(D)).double()
    net.given = net.given.double()
    return net


@pytest.mark.whole
@pytest.mark.parametrize("name", MEETING)
def test_samples_that_meet_or_are_out_of_order_are_refused(name):
    make, losses, expected = MEETING[name]
    net = make()
    if name == "attention over the batch":
        net.given = net.given.transpose(0, 1).contiguous()  # one sequence, whose places are the samples
        losses = lambda net: net.head(net.trunk(net.given))[0].square().mean(1)  # noqa: E731
    reason = refusal(net, MIXINGS["dense"](), losses)
    assert re.search(expected, reason), reason
    assert re.match(r"\S+: ", reason), reason  # a parameter's name


class Packed(nn.Module):
    """Sequences one after the other in one long one, with or without a mask that keeps them apart."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.table, self.out = nn.Linear(D, D), nn.Linear(D, D)
        of = torch.arange(S * T) // T
        self.mask = (of.unsqueeze(1) == of) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x).view(1, 1, S * T, D)
        return self.out(F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)).view(S, T, D)


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_need_a_mask_of_blocks(masked):
    torch.manual_seed(0)
    net = Model(Packed(masked), rows(T, D)).double()
    net.given = net.given.double()
    if masked:
        step(net, MIXINGS["dense"](), UPGrad(), "mixing")
    else:
        assert "table.weight: samples meet in" in refusal(net, MIXINGS["dense"]())


class SplitAttention(nn.Module):
    """torch's attention to a memory, which takes its queries' and its memory's matrix out of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x.sin(), x.sin(), need_weights=False)[0]


class Positions(nn.Module):
    """Embeddings of positions, whose one row for all samples is added to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.linear = nn.Embedding(T, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.positions(torch.arange(T)))


class TimeFirst(nn.Module):
    """A parameter that is broadcast over the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.linear = nn.Parameter(torch.randn(T, 1, D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1) + self.positions).transpose(0, 1)


class Viewed(nn.Module):
    """A parameter of which a view is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D * D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.view(D, D)


class TwoForms(nn.Module):
    """A parameter that is multiplied as a matrix and added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(T, D))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.weight) @ self.weight.mT @ torch.ones(T, D, dtype=x.dtype)


class AnyConv(nn.Module):
    """A convolution of any kind."""

    def __init__(self, kind, *given, **how) -> None:
        super().__init__()
        self.conv = kind(2, D, *given, **how)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(2, (2,) * (self.conv.weight.dim() - 2))).flatten(2).mean(2)


class Checkpointed(nn.Module):
    """A part of the model whose activations are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.last(torch.tanh(self.first(x))), x, use_reentrant=False)


UNKNOWN = {
    "attention with split weights": (lambda: Model(SplitAttention(), rows(T, D)), "attention.in_proj_weight: Split"),
    "embeddings of positions": (lambda: Model(Positions(), rows(T, D)), "positions.weight: .*EmbeddingBackward0"),
    "time first": (lambda: Model(TimeFirst(), rows(T, D)), "positions: AddBackward0 uses it"),
    "a view": (lambda: Model(Viewed(), rows(D)), "weight: ViewBackward0 uses it"),
    "two forms": (lambda: Model(TwoForms(), rows(T, D)), "weight: it is used in two forms"),
    "grouped": (lambda: Model(AnyConv(nn.Conv2d, 1, groups=2), rows(2, 4)), "conv.weight: a convolution with 2 groups"),
    "transposed": (lambda: Model(AnyConv(nn.ConvTranspose1d, 2), rows(2, 2)), "conv.weight: a transposed convolution"),
    "volumes": (lambda: Model(AnyConv(nn.Conv3d, 1), rows(2, 8)), "conv.weight: .* volumes"),
    "checkpointing": (lambda: Model(Checkpointed(), rows(D)), "as in activation checkpointing"),
    "a sparse embedding": (
        lambda: Model(nn.Embedding(7, D, sparse=True), torch.randint(7, (S, T))),
        "weight: EmbeddingBackward0 uses it",
    ),
    "scaled by frequency": (
        lambda: Model(nn.Embedding(7, D, scale_grad_by_freq=True), torch.randint(7, (S, T))),
        "weight: EmbeddingBackward0 uses it",
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_parameter_of_no_known_form_is_refused(name):
    make, expected = UNKNOWN[name]
    torch.manual_seed(0)
    net = make().double()
    if net.given.is_floating_point():
        net.given = net.given.double()
    reason = refusal(net, MIXINGS["dense"]())
    assert re.search(expected, reason), reason


def on_parameter(net: Model) -> None:
    net.trunk.first.weight.register_hook(lambda g: 2 * g)


def on_module(net: Model) -> None:
    net.trunk.last.register_full_backward_hook(lambda module, of_input, of_output: None)


@pytest.mark.parametrize("hook", [on_parameter, on_module])
def test_hooks_are_refused(hook):
    net = of_rows(nn.Tanh())
    weights = Constant([1.0, 2.0, 3.0])
    for way in ("mixing", "auto"):
        own = copy.deepcopy(net)
        hook(own)
        A, shared = MIXINGS["dense"](), dict(own.trunk.named_parameters())
        if way == "mixing":
            with pytest.raises(ValueError, match=r'jacobian is "mixing", but .*hook'):
                mtlfast.backward(own.losses(), weights, shared=shared, mixing=A, jacobian=way)
            assert all(p.grad is None for p in own.parameters())
        else:
            plan = mtlfast.backward(own.losses(), weights, shared=shared, mixing=A, jacobian=way).plan
            assert plan.way != "mixing"
            assert "hook" in plan.reason


def test_a_hook_of_a_node_is_refused():
    def losses(net: Model) -> Tensor:
        features = net.trunk(net.given)
        features.register_hook(lambda g: g / g.norm())
        return net.head(features).square().mean(1)

    assert "hooks" in refusal(of_rows(nn.Tanh()), MIXINGS["dense"](), losses)


def test_a_function_of_python_that_keeps_samples_apart_is_taken():
    step(of_rows(Alone.apply), MIXINGS["dense"](), UPGrad(), "mixing")


@pytest.mark.long
def test_a_compiled_part_is_refused():
    net = of_rows(nn.Tanh())
    compiled = torch.compile(net.trunk, backend="aot_eager")

    def losses(own: Model) -> Tensor:
        return net.head(compiled(net.given)).square().mean(1)

    with torch._functorch.config.patch(donated_buffer=False):
        A, shared = MIXINGS["dense"](), dict(net.trunk.named_parameters())
        with pytest.raises(ValueError, match=r'jacobian is "mixing", but a part of the model is compiled'):
            mtlfast.backward(losses(net), Constant([1.0, 2.0, 3.0]), shared=shared, mixing=A, jacobian="mixing")
        made = mtlfast.backward(losses(net), Constant([1.0, 2.0, 3.0]), shared=shared, mixing=A)
    assert "compiled by torch.compile" in made.plan.reason


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


def backward(per_sample: object = None, A: object = None, **more) -> mtlfast.StepResult:
    w = nn.Linear(3, 1)
    per_sample = w(torch.ones(4, 3)).squeeze(1) if per_sample is None else per_sample
    shared = more.pop("shared", w)
    return mtlfast.backward(per_sample, UPGrad(), shared=shared, mixing=torch.ones(2, 4) if A is None else A, **more)


def losses_of(*shape: int, **how) -> Tensor:
    return torch.ones(shape, requires_grad=True, **how) * 1


BAD = {
    "a list of losses": (lambda: backward([losses_of()]), TypeError, "losses is a list, expected a Tensor [S]"),
    "closures": (lambda: backward([lambda: losses_of()]), TypeError, "losses is a list, expected a Tensor [S]"),
    "a dict": (lambda: backward({"a": losses_of()}), TypeError, "losses is a dict, expected a Tensor [S]"),
    "an accumulator": (
        lambda: backward(mtlfast.TaskGradientAccumulator()),
        TypeError,
        "losses is a TaskGradientAccumulator, expected a Tensor [S]",
    ),
    "a matrix of losses": (lambda: backward(losses_of(4, 1)), ValueError, "losses has shape [4, 1], expected [S]"),
    "a scalar": (lambda: backward(losses_of()), ValueError, "losses has shape [], expected [S]"),
    "no samples": (lambda: backward(losses_of(0)), ValueError, "losses has shape [0], expected [S]"),
    "constants": (lambda: backward(torch.ones(4)), ValueError, "losses does not require grad"),
    "complex": (lambda: backward(losses_of(4, dtype=torch.cfloat)), ValueError, "losses"),
    "no tensor": (lambda: backward(A=[[1.0] * 4]), TypeError, "mixing is a list, expected a Tensor [K, S] or [S]"),
    "too few samples": (lambda: backward(A=torch.ones(2, 3)), ValueError, "mixing is [2, 3] torch.float32, expected"),
    "turned": (lambda: backward(A=torch.ones(4, 2)), ValueError, "mixing is [4, 2] torch.float32, expected"),
    "no tasks": (lambda: backward(A=torch.ones(0, 4)), ValueError, "mixing is [0, 4] torch.float32, expected"),
    "complex weights": (lambda: backward(A=torch.ones(2, 4) * 1j), ValueError, "mixing is [2, 4] torch.complex64"),
    "too many dimensions": (lambda: backward(A=torch.ones(2, 4, 1)), ValueError, "mixing is [2, 4, 1]"),
    "fractions of tasks": (lambda: backward(A=torch.ones(4)), ValueError, "mixing is [4] torch.float32, expected"),
    "bools for tasks": (lambda: backward(A=torch.ones(4, dtype=torch.bool)), ValueError, "mixing is [4] torch.bool"),
    "too few tasks": (lambda: backward(A=torch.zeros(3).long()), ValueError, "mixing is [3] torch.int64, expected"),
    "below -1": (lambda: backward(A=torch.tensor([0, 1, -2, 0])), ValueError, "mixing has -2, expected tasks from 0"),
    "all of no task": (lambda: backward(A=torch.full((4,), -1)), ValueError, "mixing has -1, expected tasks from 0"),
    "features": (lambda: backward(features=[losses_of(4)], shared=None), ValueError, "features"),
    "at": (lambda: backward(at=[losses_of(4)], shared=None), ValueError, "at"),
    "second": (lambda: backward(second=[losses_of()]), ValueError, "second"),
    "no mixing": (
        lambda: mtlfast.backward([losses_of()], UPGrad(), jacobian="mixing"),
        ValueError,
        'jacobian is "mixing", expected mixing= beside it',
    ),
    "a storage dtype": (
        lambda: backward(jacobian="mixing", storage_dtype=torch.bfloat16),
        ValueError,
        "storage_dtype",
    ),
    "an unknown way": (lambda: backward(jacobian="only"), ValueError, "jacobian is 'only', expected"),
    "an element-wise method": (
        lambda: mtlfast.backward(
            (w := nn.Linear(3, 1))(torch.ones(4, 3)).squeeze(1),
            Median(),
            shared=w,
            mixing=torch.ones(2, 4),
            jacobian="mixing",
        ),
        (ValueError, TypeError),
        'expected jacobian="stored"',
    ),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, kind, expected = BAD[name]
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert expected in message, message
    assert ". " not in message
    assert "\n" not in message


def test_an_element_wise_method_stores_the_gradients():
    w = nn.Linear(3, 1)
    made = mtlfast.backward(w(torch.ones(4, 3)).squeeze(1), Median(), shared=w, mixing=torch.ones(2, 4))
    assert made.plan.way == "stored"
