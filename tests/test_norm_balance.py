"""Norm balancing: by hand, on norms alone, and before surgery."""

import pytest
import torch
from methods import METHODS, weigh
from test_methods import jacobian

import mtlfast
from mtlfast import ops
from mtlfast.aggregation import (
    CRMOGM,
    MGDA,
    ClipNorm,
    Compose,
    CrossNorm,
    FairGrad,
    InverseNorm,
    Mean,
    NashMTL,
    NormBalance,
    PCGrad,
    Reads,
    RowsJacobian,
    Step,
    Sum,
)

LENGTHS = [1.0, 2.0, 4.0, 0.0, 5.0]


def gram_of(*lengths: float, device: str) -> torch.Tensor:
    J = jacobian(num_tasks=len(lengths))
    J = J / J.norm(dim=1, keepdim=True) * torch.tensor(lengths, dtype=torch.float64)[:, None]
    return (J @ J.T).to(device)


def test_norm_balance_by_hand(device):
    gram = gram_of(*LENGTHS, device=device)
    typical = {"mean": 3, "geometric": 40**0.25, "harmonic": 4 / 1.95, "min": 1, "max": 5, "median": 2, 4: 5, 3: 0}
    for target, norm in typical.items():
        weights = NormBalance(target).weights(gram).cpu()
        expected = torch.tensor([norm / length if length else 0 for length in LENGTHS], dtype=torch.float64)
        assert torch.allclose(weights, expected), target
    present = [0, 2, 4]
    some = gram[present][:, present]
    assert torch.allclose(NormBalance(4).weights(some, tasks=present).cpu(), torch.tensor([5, 1.25, 1]).double())
    assert torch.allclose(NormBalance(3).weights(some, tasks=present).cpu(), torch.tensor([1, 0.25, 0.2]).double())
    assert not NormBalance().weights(torch.zeros(3, 3, dtype=torch.float64, device=device)).any()


def test_clip_norm_by_hand(device):
    gram = gram_of(*LENGTHS, device=device)
    assert torch.allclose(ClipNorm(2.0).weights(gram).cpu(), torch.tensor([1, 1, 0.5, 0, 0.4]).double())
    assert torch.allclose(ClipNorm().weights(gram).cpu(), torch.tensor([1, 1, 0.75, 0, 0.6]).double())


def test_cross_norm_and_inverse_norm_by_hand(device):
    assert torch.allclose(CrossNorm().weights(gram_of(2, 5, device=device)).cpu(), torch.tensor([2.5, 0.4]).double())
    assert CrossNorm().weights(gram_of(2, device=device), tasks=(1,)).tolist() == [1]
    assert CrossNorm().weights(gram_of(2, 0, device=device)).tolist() == [0, 0]
    expected = torch.tensor([1, 0.5, 0.25, 0, 0.2], dtype=torch.float64) / 1.95
    assert torch.allclose(InverseNorm().weights(gram_of(*LENGTHS, device=device)).cpu(), expected)


def test_norms_alone_are_read(monkeypatch, device):
    def refuse(*args, **kwargs):
        raise AssertionError("the Gram matrix was computed")

    grads = mtlfast.TaskGradients.from_matrix(jacobian(num_tasks=3).to(device))
    composed, smoothed = (lambda: Compose(NormBalance(), Mean())), (lambda: CRMOGM(ClipNorm()))
    for make in (NormBalance, ClipNorm, InverseNorm, composed, smoothed):
        wanted = make().weights(ops.gram(grads))
        with monkeypatch.context() as patch:
            patch.setattr(ops, "gram", refuse)
            weights, gram = make().weigh(RowsJacobian(grads), Step(3))
        assert gram is None
        assert torch.allclose(weights, wanted, rtol=1e-12)
    weights, gram = NormBalance().weigh(RowsJacobian(grads), Step(3), need_gram=True)
    assert torch.equal(gram, ops.gram(grads))


@pytest.mark.parametrize("scale", [2.0**-10, 65536.0])
@pytest.mark.parametrize("name", METHODS)
def test_with_loss_scale_the_update_is_scaled_and_else_the_same(name, scale, device):
    method = METHODS[name]
    num_tasks = min(3 if not method.any_tasks else max(3, method.least_tasks), method.most_tasks)
    J = jacobian(num_tasks=num_tasks).to(device)
    if method.cross:
        pytest.skip("two batches' weights are not for scaled gradients")
    plain = weigh(method.make(), J @ J.T)
    for given in (scale, torch.tensor(scale, device=device), torch.tensor([scale], device=device)):
        scaled = weigh(method.make(), (J @ J.T) * scale**2, loss_scale=given)
        assert torch.allclose(scaled, plain, rtol=1e-9, atol=1e-12)


def test_an_absolute_norm_needs_the_loss_scale(device):
    gram = gram_of(3, 4, device=device)
    for aggregator in (NashMTL(), FairGrad(2.0), ClipNorm(1.0)):
        assert not torch.allclose(aggregator.weights(gram * 100), aggregator.weights(gram))
    with pytest.raises(ValueError, match=r"ClipNorm: loss_scale has shape \[2\], expected a number"):
        ClipNorm(1.0).weights(gram, loss_scale=torch.ones(2))
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7, device=device))
    updates = []
    for scale in (1.0, 1024.0):
        p.grad = None
        losses = [scale * (p - k).square().sum() for k in range(3)]
        mtlfast.backward(losses, NashMTL(), shared=[p], loss_scale=scale)
        updates.append(p.grad / scale)
    assert updates[0].norm().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(updates[0], updates[1], rtol=1e-5)


def test_compose_is_surgery_on_the_scaled_gradients(device):
    J = jacobian(num_tasks=5).to(device)
    J[0] *= 100
    for balance in (NormBalance(), InverseNorm(), ClipNorm("mean")):
        scales = balance.weights(J @ J.T)
        scaled = scales[:, None] * J
        for surgery in (MGDA(), Sum(), PCGrad(order="fixed"), CRMOGM(MGDA())):
            composed = Compose(balance, surgery).weights(J @ J.T)
            surgery.reset()
            expected = surgery.weights(scaled @ scaled.T) @ scaled
            assert torch.allclose(composed @ J, expected, rtol=1e-9, atol=1e-9)
            surgery.reset()


def test_compose_reads_the_gradients_twice(monkeypatch, device):
    calls = []

    def counted(name, original):
        return lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs)

    for name in ("gram", "norms", "combine"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    Compose(NormBalance(), PCGrad())(jacobian(num_tasks=3).to(device))
    assert calls == ["gram", "combine"]


def test_compose_keeps_both_states(device):
    gram = gram_of(1, 2, 3, device=device)
    composed = Compose(CRMOGM(NormBalance()), NashMTL(update_weights_every=2))
    composed.weights(gram)
    again = Compose(CRMOGM(NormBalance()), NashMTL(update_weights_every=2))
    again.load_state_dict(composed.state_dict())
    assert torch.equal(composed.weights(2 * gram), again.weights(2 * gram))
    assert composed.diagnostics() == {"unconverged": 0, "decided_by_noise": 0}
    assert set(composed.state_dict()) == {"balance.state", "surgery.state"}
    composed.reset()
    assert composed.balance.state is None
    assert composed.surgery.state is None
    assert Compose(NormBalance(), Sum()).reads is Reads.NORMS
    with pytest.raises(TypeError, match="Compose: surgery is a int, expected one with weights"):
        Compose(NormBalance(), 3)
