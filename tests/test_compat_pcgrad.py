"""The replacement for Pytorch-PCGrad's optimizer, compared draw by draw with its algorithm, and what it adds."""

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor, nn

from mtlfast.compat.pcgrad import PCGrad


class Network(nn.Module):
    """A trunk, a head for each task, a layer that only two tasks reach, one that none reaches, and a frozen one."""

    def __init__(self, num_tasks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 4, dtype=dtype)
        self.some = nn.Linear(4, 4, dtype=dtype)
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=dtype) for _ in range(num_tasks))
        self.unused = nn.Linear(2, 2, dtype=dtype)
        self.frozen = nn.Linear(4, 4, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.frozen(torch.tanh(self.trunk(x)))
        return [
            (head(self.some(features) if k < 2 else features) - k).square().mean() for k, head in enumerate(self.heads)
        ]


def as_the_original(parameters: list[Tensor], losses: list[Tensor]) -> None:
    """Pytorch-PCGrad's algorithm in float64: flat copies, one list that is shuffled again and again, subtractions."""
    flat, touched = [], []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, [p for p in parameters if p.requires_grad], retain_graph=True, allow_unused=True
        )
        left = iter(gradients)
        gradients = [next(left) if p.requires_grad else None for p in parameters]
        zeros = [torch.zeros_like(p) for p in parameters]
        flat.append(torch.cat([(z if g is None else g).reshape(-1) for z, g in zip(zeros, gradients, strict=True)]))
        touched.append(
            torch.cat(
                [torch.full_like(z, float(g is not None)).reshape(-1) for z, g in zip(zeros, gradients, strict=True)]
            )
        )
    flat = [gradient.double() for gradient in flat]
    shared = torch.stack(touched).prod(dim=0).bool()
    projected, meets = [gradient.clone() for gradient in flat], list(flat)
    for gradient in projected:
        random.shuffle(meets)
        for other in meets:
            product = gradient @ other
            if product < 0:
                gradient -= product * other / other.norm() ** 2
    merged = torch.where(shared, torch.stack(projected).mean(dim=0), torch.stack(projected).sum(dim=0))
    for parameter, gradient in zip(parameters, merged.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.reshape(parameter.shape).to(parameter.dtype)


def as_the_paper(network: Network, losses: list[Tensor]) -> None:
    """The paper's algorithm: the trunk alone, a new order of the others for each gradient, and a sum."""
    reached = [p for p in network.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(loss, reached, retain_graph=True, allow_unused=True) for loss in losses]
    shared = [t for t in range(len(reached)) if all(row[t] is not None for row in rows)]
    J = torch.stack([torch.cat([row[t].reshape(-1) for t in shared]) for row in rows]).double()
    projected = J.clone()
    for i in range(len(J)):
        order = list(range(len(J)))
        random.shuffle(order)
        for j in order:
            if j != i and (product := projected[i] @ J[j]) < 0:
                projected[i] -= product / (J[j] @ J[j]) * J[j]
    update = iter(projected.sum(dim=0).split([reached[t].numel() for t in shared]))
    for t, parameter in enumerate(reached):
        given = [row[t] for row in rows if row[t] is not None]
        parameter.grad = next(update).reshape(parameter.shape).to(parameter.dtype) if t in shared else None
        if t not in shared and given:
            parameter.grad = sum(given)


def two(num_tasks: int, seed: int, dtype: torch.dtype, device: str) -> tuple[Network, Network, Tensor]:
    torch.manual_seed(seed)
    one = Network(num_tasks, dtype).to(device)
    return one, copy.deepcopy(one), torch.randn(6, 5, dtype=dtype, device=device)


@pytest.mark.parametrize("strict", [True, False])
def test_the_same_gradients_over_500_random_cases(strict, device):
    met_itself = 0
    for seed in range(500):
        num_tasks = 1 + seed % 6
        one, other, x = two(num_tasks, seed, torch.float64, device)
        random.seed(seed)
        face = PCGrad(torch.optim.SGD(one.parameters(), lr=0.1), strict=strict)
        face.pc_backward(one(x))
        drawn = random.random()
        random.seed(seed)
        if strict:
            as_the_original(list(other.parameters()), other(x))
        else:
            as_the_paper(other, other(x))
        assert drawn == random.random()  # as many draws
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12), (seed, name)
        met_itself += num_tasks >= 3
    assert met_itself > 300


def test_meeting_itself_matters(device):
    # With it the update differs in some of the cases above: here one where it does.
    differs = 0
    for seed in range(100):
        random.seed(seed)
        torch.manual_seed(seed)
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64, device=device))
        J = torch.randn(4, 3, dtype=torch.float64, device=device)
        PCGrad(torch.optim.SGD([p], lr=1.0)).pc_backward(list(J @ p))
        expected = torch.zeros(3, dtype=torch.float64, device=device)
        random.seed(seed)
        order = list(range(4))
        for i in range(4):
            random.shuffle(order)
            g = J[i].clone()
            for j in order:
                if j != i and (product := g @ J[j]) < 0:
                    g -= product / (J[j] @ J[j]) * J[j]
            expected += g / 4
        differs += not torch.allclose(p.grad, expected)
    assert 2 < differs < 60


def test_training_ends_at_the_same_parameters(device):
    one, other, x = two(4, 0, torch.float32, device)
    face = PCGrad(torch.optim.Adam(one.parameters(), lr=1e-2, weight_decay=0.1))
    plain = torch.optim.Adam(other.parameters(), lr=1e-2, weight_decay=0.1)
    random.seed(3)
    for _ in range(20):
        face.zero_grad()
        face.pc_backward(one(x))
        face.step()
    random.seed(3)
    for _ in range(20):
        as_the_original(list(other.parameters()), other(x))
        plain.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_frozen_and_unused_parameters(device):
    one, other, x = two(3, 1, torch.float32, device)
    PCGrad(torch.optim.SGD(one.parameters(), lr=0.1)).pc_backward(one(x))
    assert not one.frozen.weight.grad.any()
    assert not one.unused.weight.grad.any()
    PCGrad(torch.optim.SGD(other.parameters(), lr=0.1), strict=False).pc_backward(other(x))
    assert other.frozen.weight.grad is None
    assert other.unused.weight.grad is None
    # A head is its own task's alone.
    (expected,) = torch.autograd.grad(other(x)[1], [other.heads[1].weight])
    assert torch.allclose(other.heads[1].weight.grad, expected)


def test_it_is_an_optimizer(device):
    network, _, x = two(3, 2, torch.float32, device)
    inner = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
    face = PCGrad(inner)
    assert isinstance(face, torch.optim.Optimizer)
    assert face.optimizer is inner
    assert face.param_groups is inner.param_groups
    schedule = torch.optim.lr_scheduler.StepLR(face, step_size=1, gamma=0.5)
    called = []
    face.register_step_pre_hook(lambda *args: called.append("before"))
    face.register_step_post_hook(lambda *args: called.append("after"))
    for _ in range(2):
        face.zero_grad()
        assert network.trunk.weight.grad is None
        face.pc_backward(network(x))
        face.step()
        schedule.step()
    assert called == ["before", "after"] * 2
    assert face.param_groups[0]["lr"] == 0.25
    saved = face.state_dict()
    assert saved.keys() == inner.state_dict().keys()
    plain = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
    plain.load_state_dict(saved)
    PCGrad(plain).load_state_dict(saved)
    face.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert len(inner.param_groups) == 2
    for again in (copy.deepcopy(face), pickle.loads(pickle.dumps(PCGrad(torch.optim.SGD([nn.Parameter(x)], lr=0.1))))):
        assert isinstance(again, PCGrad)
        again.zero_grad()
    assert "reduction='mean', strict=True, optimizer=SGD" in repr(face)
    with pytest.raises(AttributeError):
        face.no_such_thing()


@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer unscales the gradients itself
def test_with_a_grad_scaler(fused, device):
    network, other, x = two(3, 4, torch.float32, device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    faces = [PCGrad(torch.optim.SGD(n.parameters(), lr=0.1, fused=fused)) for n in (network, other)]
    for face, n, scaled in zip(faces, (network, other), (True, False), strict=True):
        random.seed(0)
        losses = [scaler.scale(loss) for loss in n(x)] if scaled else n(x)
        face.pc_backward(losses)
        if scaled:
            scaler.step(face)
            scaler.update()
        else:
            face.step()
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bad_arguments(device):
    p = nn.Parameter(torch.ones(2, device=device))
    with pytest.raises(TypeError, match=r"PCGrad: optimizer is a list, expected a torch.optim.Optimizer"):
        PCGrad([p])
    with pytest.raises(ValueError, match="PCGrad: reduction is 'max', expected 'mean' or 'sum'"):
        PCGrad(torch.optim.SGD([p], lr=0.1), "max")
    face = PCGrad(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match="PCGrad: got no objectives, expected at least one"):
        face.pc_backward([])
    q = nn.Parameter(torch.ones(2, device=device))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="PCGrad: 1 objectives reach none of the parameters"):
        face.pc_backward([q.sum()])
    assert torch.equal(p.grad, torch.ones_like(p))  # an error writes nothing


def test_objectives_in_every_form(device):
    for form in (list, tuple, iter, lambda losses: dict(enumerate(losses)), torch.stack):
        p = nn.Parameter(torch.tensor([1.0, 2.0], device=device))
        PCGrad(torch.optim.SGD([p], lr=0.1)).pc_backward(form([p.sum(), p.square().sum()]))
        assert torch.allclose(p.grad.cpu(), torch.tensor([1.5, 2.5]))
    q = nn.Parameter(torch.ones(1, device=device))
    PCGrad(torch.optim.SGD([q], lr=0.1)).pc_backward([q * 2])  # one element is a scalar


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: None, "PCGrad: objective 1 is a NoneType, expected a scalar Tensor$"),
        (lambda p: 1.0, "PCGrad: objective 1 is a float, expected a scalar Tensor$"),
        (lambda p: torch.tensor(0.0), "PCGrad: objective 1 does not require grad, expected one that depends on par"),
        (lambda p: p, r"PCGrad: objective 1 has shape \[2\], expected a scalar"),
    ],
)
def test_objectives_of_every_wrong_kind(wrong, message):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises((ValueError, TypeError), match=message):
        PCGrad(torch.optim.SGD([p], lr=0.1)).pc_backward([p.sum(), wrong(p)])
    with pytest.raises(TypeError, match="PCGrad: objectives is a int, expected a list of scalars"):
        PCGrad(torch.optim.SGD([p], lr=0.1)).pc_backward(3)
    assert p.grad.tolist() == [1, 1]


def test_nothing_to_train_and_sparse_gradients_are_one_sentence():
    p, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    losses = [(p * embedding(torch.tensor(k))).sum() for k in range(2)]
    face = PCGrad(torch.optim.SGD([p, embedding.weight], lr=0.1))
    with pytest.raises(
        ValueError, match=r"PCGrad: the gradient of parameter 1 has layout torch\.sparse_coo, expected a"
    ):
        face.pc_backward(losses)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="PCGrad: none of the optimizer's 1 parameters requires grad"):
        PCGrad(torch.optim.SGD([frozen], lr=0.1)).pc_backward([p.sum()])
    assert p.grad is None


@pytest.mark.parametrize("strict", [True, False])
def test_parameters_of_two_dtypes_have_one_gram_matrix(strict):
    a, b = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(2))
    losses = [a.float().sum() + b.sum(), b.sum() - 2 * a.float().sum()]
    random.seed(0)
    PCGrad(torch.optim.SGD([a, b], lr=0.1), strict=strict).pc_backward(losses)
    joined = nn.Parameter(torch.ones(5))
    random.seed(0)
    PCGrad(torch.optim.SGD([joined], lr=0.1), strict=strict).pc_backward(
        [joined.sum(), joined[3:].sum() - 2 * joined[:3].sum()]
    )
    assert (a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(torch.cat([a.grad.float(), b.grad]), joined.grad, rtol=1e-2)


@pytest.mark.parametrize("strict", [True, False])
def test_gradients_of_another_dtype_than_the_parameters(strict, device):
    network, other, x = two(3, 5, torch.bfloat16, device)
    for parameter in network.parameters():
        parameter.grad_dtype = torch.float32
    for n in (network, other):
        random.seed(0)
        PCGrad(torch.optim.SGD(n.parameters(), lr=0.1), strict=strict).pc_backward(n(x))
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.bfloat16)
        assert a.grad is None or torch.allclose(a.grad, b.grad.float(), rtol=5e-2, atol=5e-2)


def test_a_failure_while_gradients_are_written_leaves_them_as_they_were(device, monkeypatch):
    network, _, x = two(3, 6, torch.float32, device)
    face = PCGrad(torch.optim.SGD(network.parameters(), lr=0.1))
    face.pc_backward(network(x))
    before = [parameter.grad for parameter in network.parameters()]
    values = [gradient.clone() for gradient in before]

    def out_of_memory(parameters):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("mtlfast._grad.fill_with_zeros", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        face.pc_backward(network(2 * x))
    for parameter, gradient, value in zip(network.parameters(), before, values, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)
