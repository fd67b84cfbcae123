"""What cannot be had from one pass over samples: refused by name, or computed in an ordinary way with the reason."""

import copy
import re

import pytest
import torch
from mixing_between import of_rows
from mixing_models import MIXINGS, Attention, D, Model, S, T, assert_same_grads, disjoint, rows, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mtlfast
from mtlfast.aggregation import Constant, UPGrad

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


ORDER = torch.randperm(S, generator=torch.Generator().manual_seed(3))
MEETING = {
    "BatchNorm": (lambda: of_rows(nn.BatchNorm1d(D)), None, "BatchNorm in training, in which samples meet"),
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


class Overlapping(nn.Module):
    """A parameter of which two parts are used that have rows in common."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D + 1, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight[:D]) @ self.weight[1:]


class Looked(nn.Module):
    """A table whose rows are a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table(torch.arange(D) // 2)


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
    "overlapping parts": (lambda: Model(Overlapping(), rows(D)), "weight: parts of it are used that have elements in"),
    "a matrix from a table": (lambda: Model(Looked(), rows(D)), "table.weight: samples meet in EmbeddingBackward0"),
    "BatchNorm in training": (
        lambda: Model(nn.BatchNorm1d(D), rows(D)),
        "weight: BatchNorm in training, in which samples meet, uses it",
    ),
    "two forms": (lambda: Model(TwoForms(), rows(T, D)), "weight: it is used in two forms"),
    "grouped": (
        lambda: Model(AnyConv(nn.Conv2d, 3, stride=3, padding=1, groups=2), rows(2, 4)),
        "conv.weight: a convolution with 2 groups,",
    ),
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
