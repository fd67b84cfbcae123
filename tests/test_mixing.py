"""Mixtures of the losses of samples by one backward pass, beside the stored way with the same mixtures."""

import copy

import pytest
import torch
from mixing_models import (
    MIXINGS,
    MODELS,
    D,
    Lora,
    Model,
    S,
    T,
    assert_as_stored,
    assert_same_grads,
    assert_same_gram,
    disjoint,
    model,
    rows,
    step,
)
from torch import Tensor, nn

import mtlfast
from mtlfast import weighting
from mtlfast.aggregation import IMTLG, MGDA, CAGrad, ClipNorm, Constant, GradVac, NashMTL, PCGrad, Sum, UPGrad

pytestmark = pytest.mark.native


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("name", MODELS)
def test_the_gram_matrix_and_the_update_are_those_of_the_stored_way(name, mixing):
    assert_as_stored(model(name), MIXINGS[mixing]())


METHODS = {
    "PCGrad": lambda: PCGrad(generator=torch.Generator().manual_seed(1)),
    "UPGrad": UPGrad,
    "MGDA": MGDA,
    "CAGrad": lambda: CAGrad(0.5),
    "IMTLG": IMTLG,
    "NashMTL": NashMTL,
}
METHODS |= {"ClipNorm": lambda: ClipNorm(0.5)}


@pytest.mark.parametrize("mixing", ["dense", "disjoint", "each sample"])
@pytest.mark.parametrize("name", ["transformer, time first", "MLP towers", "conv 2d, strided", "tied head"])
@pytest.mark.parametrize("method", METHODS)
def test_whole_methods(method, name, mixing):
    assert_as_stored(model(name), MIXINGS[mixing](), rtol=1e-11, aggregator=METHODS[method])


@pytest.mark.parametrize("name", MODELS)
def test_one_sample_may_have_any_number_of_tasks(name):
    if name == "tied head" or not isinstance(net := model(name), Model) or name == "cross attention":
        pytest.skip("its input is of S samples")
    net.given = net.given[:1]
    assert_as_stored(net, torch.tensor([[1.0], [-0.5], [0.0]]))
    assert_as_stored(net, torch.tensor([0]))


def test_one_sample_may_meet_itself():
    net = Model(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, affine=False), nn.Linear(D, D)), rows(D)).double()
    net.given = net.given.double()

    def losses(net: Model) -> Tensor:
        return net.losses().sum().reshape(1)

    assert_as_stored(net, torch.tensor([[1.0], [-0.5]]), losses=losses)


@pytest.mark.parametrize("order", ["batch first", "time first"])
def test_steps_from_a_matrix_of_zeros_on(order):
    torch.manual_seed(0)
    net = Model(nn.Sequential(Turn(), Lora(), Turn()) if order == "time first" else Lora(), rows(T, D)).double()
    net.given = net.given.double()
    for name, parameter in net.named_parameters():
        if name.endswith("high"):
            nn.init.zeros_(parameter)
    A = MIXINGS["dense"]()
    for _ in range(3):
        shared = {name: p for name, p in net.trunk.named_parameters() if p.requires_grad}
        found = []
        for way in ("mixing", "stored"):
            net.zero_grad()
            made = mtlfast.backward(
                net.losses(), Constant([1.0, -1.0, 2.0]), shared=shared, mixing=A, jacobian=way, diagnostics=True
            )
            found.append((made.gram, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}))
        assert_same_gram(found[0][0], found[1][0])
        assert_same_grads(found[0][1], found[1][1])
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


class Turn(nn.Module):
    """Samples and places in turn, in memory as well."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()


WEIGHTINGS = {
    "UW": lambda: weighting.UW(3).double(),
    "FAMO": lambda: weighting.FAMO(3),
    "DWA": lambda: weighting.DWA(3),
    "GradNorm": lambda: weighting.GradNorm(3),
    "a weight of 0": lambda: weighting.Constant([0.0, 2.0, 0.5]),
    "sums of absolute values": lambda: weighting.LRAnnealing(3),
}


@pytest.mark.parametrize("mixing", ["dense", "disjoint", "a task without samples"])
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("method", ["UPGrad", "CAGrad"])
def test_loss_weightings(method, name, mixing):
    net, A = model("MLP towers"), MIXINGS[mixing]()
    A = A if A.dim() == 1 else A.abs()  # losses above 0
    found = {}
    for way in ("mixing", "stored"):
        own, weights = copy.deepcopy(net), WEIGHTINGS[name]()
        for _ in range(3):
            made = step(own, A, METHODS[method](), way, weighting=weights, diagnostics=True)
        found[way] = made
        found[way].grads.update({name: p.grad for name, p in weights.named_parameters()})
    assert_same_gram(found["mixing"].step.gram, found["stored"].step.gram, 1e-11)
    torch.testing.assert_close(found["mixing"].step.loss_weights, found["stored"].step.loss_weights, rtol=1e-9, atol=0)
    assert_same_grads(found["mixing"].grads, found["stored"].grads, 1e-9)


@pytest.mark.parametrize("mixing", ["dense", "disjoint"])
def test_a_loss_scale_is_taken_into_account(mixing):
    net, A = model("transformer, padded"), MIXINGS[mixing]()

    def scaled(net: nn.Module) -> Tensor:
        return net.losses() * 1024

    plain = assert_as_stored(net, A, 1e-11, METHODS["ClipNorm"])
    found = assert_as_stored(net, A, 1e-11, METHODS["ClipNorm"], losses=scaled, loss_scale=1024.0)
    assert_same_grads({k: None if g is None else g / 1024 for k, g in found.grads.items()}, plain.grads, 1e-11)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("groups", ["tensor", "module", 1, None])
@pytest.mark.parametrize("method", ["Constant", "UPGrad", "PCGrad"])
def test_groups(method, groups, mixing):
    net, A = model("MLP over tokens"), MIXINGS[mixing]()
    tasks = len(A) if A.dim() == 2 else int(A.max()) + 1
    make = (lambda: Constant([1.0 + k for k in range(tasks)])) if method == "Constant" else METHODS[method]
    assert_as_stored(net, A, 1e-11, make, groups=groups)


@pytest.mark.parametrize("mixing", ["dense", "disjoint", "an unused sample"])
def test_an_existing_grad_is_added_to_and_heads_get_their_plain_gradient(mixing):
    net, A = model("transformer, batch first"), MIXINGS[mixing]()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = assert_as_stored(net, A)
    matrix = A if A.dim() == 2 else nn.functional.one_hot(A, 3).mT
    plain = copy.deepcopy(net)
    (matrix.double() @ plain.losses()).sum().backward()
    for name, parameter in plain.head.named_parameters():
        torch.testing.assert_close(found.grads[f"head.{name}"], parameter.grad, rtol=1e-12, atol=1e-12)


def test_existing_grads_stay_the_same_tensors():
    net = model("MLP towers")
    before = []
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
        before.append(parameter.grad)
    mtlfast.backward(net.losses(), UPGrad(), shared=net.trunk, mixing=disjoint(3), jacobian="mixing")
    assert all(parameter.grad is grad for parameter, grad in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("learned", [False, True])
def test_the_graph_can_be_kept(learned):
    net, A = model("MLP towers"), MIXINGS["dense"]()
    more = {"weighting": weighting.GradNorm(3)} if learned else {}
    losses = net.losses().abs()
    mtlfast.backward(losses, Sum(), shared=net.trunk, mixing=A.abs(), jacobian="mixing", retain_graph=True, **more)
    net.zero_grad()
    mtlfast.backward(losses, Sum(), shared=net.trunk, mixing=A, jacobian="mixing")
    twin = copy.deepcopy(net)
    twin.zero_grad()
    (A @ twin.losses()).sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_diagnostics_give_the_gram_matrix_of_fixed_weights():
    net, A = model("MLP"), MIXINGS["dense"]()
    assert step(net, A, Sum(), "mixing").step.gram is None
    made = step(net, A, Sum(), "mixing", diagnostics=True).step
    each = [torch.autograd.grad(loss, list(net.trunk.parameters()), retain_graph=True) for loss in A @ net.losses()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in each])
    torch.testing.assert_close(made.gram, J @ J.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.losses, A @ net.losses().detach())


def test_a_task_without_samples_keeps_its_place():
    net = model("MLP towers")
    for A in (MIXINGS["a task without samples"](), MIXINGS["a task without samples, disjoint"]()):
        made = step(net, A, UPGrad(), "mixing", diagnostics=True).step
        assert made.tasks == (0, 1, 2)
        assert not made.gram[1].any()
        assert not made.gram[:, 1].any()
        assert made.losses[1] == 0


@pytest.mark.parametrize("first", ["finite", "NaN"])
@pytest.mark.parametrize(
    "name", ["MLP towers", "transformer, time first", "conv 2d", "tied head", "embedding of a bag"]
)
@pytest.mark.parametrize("mixing", ["dense", "disjoint"])
def test_a_sample_that_is_not_finite(mixing, name, first):
    net = model(name)
    A = MIXINGS["dense"]() if mixing == "dense" else torch.tensor([0, 1, 1, 2, 0])
    factors = torch.ones(S, dtype=torch.float64)
    aggregator = GradVac()
    shared = dict(net.trunk.named_parameters())

    def run() -> mtlfast.StepResult:
        net.zero_grad()
        per_sample = net.losses() * factors
        return mtlfast.backward(per_sample, aggregator, shared=shared, mixing=A, jacobian="mixing", diagnostics=True)

    if first == "finite":
        run()
    before = copy.deepcopy(aggregator.state_dict())
    factors[3] = torch.nan
    gram = run().gram
    assert not all(p.grad.isfinite().all() for p in net.trunk.parameters())
    for key, value in aggregator.state_dict().items():
        assert torch.as_tensor(value).isfinite().all()
        assert key not in before or torch.equal(torch.as_tensor(value), torch.as_tensor(before[key]))
    if mixing == "disjoint":
        assert gram[:2, :2].isfinite().all()
        assert gram[2].isnan().any()
    factors[3] = 1.0
    run()  # what the probe saw must not be kept
    assert_same_gram(run().gram, step(net, A, Constant([1.0] * 3), "stored", diagnostics=True).step.gram)
    assert all(p.grad.isfinite().all() for p in net.parameters())


AUTOCAST = ["transformer, batch first, causal", "MLP", "conv 2d", "tied head", "LoRA", "RMSNorm", "self attention"]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm's, of torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AUTOCAST)
def test_float32_and_autocast(name, dtype):
    net = model(name).float()
    if isinstance(net, Model) and net.given.is_floating_point():
        net.given = net.given.float()

    def losses(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return net.losses()

    A = MIXINGS["dense"]()
    if dtype == torch.float32:
        assert_as_stored(net, A, 5e-6, losses=losses)
    else:
        assert_as_stored(net, A, 2e-2, losses=losses)
