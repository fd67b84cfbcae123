"""The quadratic programs behind the aggregators are solved: their relative KKT residuals are at most 1e-10."""

import pytest
import torch
from test_methods import hard_gradients, jacobian
from torch import Tensor

import mtlfast
from mtlfast.aggregation import MGDA, PCD, CAGrad, DualProj, UPGrad

pytestmark = pytest.mark.native
RESIDUAL = 1e-10
TASKS = [1, 2, 3, 8, 40, 128]


def problems(num_tasks: int) -> dict[str, Tensor]:
    """Name -> Jacobian: random ones of each rank, and the hard ones."""
    ranks = {f"rank {r}": jacobian(num_tasks=num_tasks, rank=r) for r in {max(1, num_tasks // 2), num_tasks}}
    positive = {"no conflict": jacobian(num_tasks=num_tasks).abs()}
    return {"random": jacobian(num_tasks=num_tasks), **ranks, **positive, **hard_gradients(max(num_tasks, 2))}


def solved(aggregator, J: Tensor, device: str) -> Tensor:
    weights = aggregator.weights((J @ J.mT).to(device), rtol=1e-13).cpu()
    assert aggregator.diagnostics()["unconverged"] == 0
    return weights


@pytest.mark.parametrize("num_tasks", TASKS)
def test_mgda_is_the_shortest_combination(num_tasks, device):
    for kind, J in problems(num_tasks).items():
        G = J @ J.mT
        w = solved(MGDA(), J, device)
        assert w.min() >= 0
        assert w.sum().item() == pytest.approx(1, abs=1e-12)
        # No task's gradient is shorter along the combination than the combination itself, beyond what G's own
        # rounding allows each entry.
        shortfall = w @ G @ w - G @ w
        scale = (w @ G.diagonal().sqrt()) * G.diagonal().sqrt() + w @ G @ w
        assert (shortfall <= RESIDUAL * scale.clamp(min=1e-300)).all(), kind


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("reg_eps", [0.0, 1e-4])
def test_dualproj_is_the_projection_and_upgrad_the_sum_of_them(num_tasks, reg_eps, device):
    for kind, J in problems(num_tasks).items():
        G = J @ J.mT
        K = len(G)
        regularised = G / G.trace().clamp(min=1e-300)
        regularised = regularised + reg_eps * regularised.diagonal().diag()
        v = solved(DualProj(reg_eps=reg_eps), J, device)
        excess, slope = v - 1 / K, regularised @ v
        norms = regularised.diagonal().sqrt()
        scale = norms * (v @ norms)
        assert (excess >= 0).all(), kind
        assert (slope >= -RESIDUAL * scale).all(), kind
        assert ((excess * slope).abs() <= RESIDUAL * v.max() * scale.clamp(min=1e-300)).all(), kind
    J = jacobian(num_tasks=num_tasks)
    parts = [
        solved(DualProj(torch.eye(num_tasks, dtype=torch.float64)[i] / num_tasks, reg_eps), J, device)
        for i in range(min(num_tasks, 8))
    ]
    others = torch.cat([torch.zeros(min(num_tasks, 8)), torch.ones(max(0, num_tasks - 8))]).double()
    some = solved(UPGrad((1 - others) / num_tasks, reg_eps), J, device)
    assert torch.allclose(some @ J, sum(parts) @ J, atol=1e-9)


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("c", [0.1, 0.5, 1.0, 4.0])
def test_cagrad_is_at_the_minimum_of_its_dual(num_tasks, c, device):
    for kind, J in problems(num_tasks).items():
        G = J @ J.mT
        K, size = len(G), float(J.norm())
        weights = solved(CAGrad(c), J, device)
        mean = G.mean().clamp(min=0).sqrt()
        extra = weights - 1 / K
        # The update stays in the ball around the mean gradient.
        assert (extra @ G @ extra).clamp(min=0).sqrt() <= (1 + 1e-9) * max(c, 1) * mean + 1e-6 * size, kind
        if extra.abs().max() < 1e-12 and c * mean <= 1e-6 * size:
            continue
        w = extra / extra.sum()
        norm = (w @ G @ w).clamp(min=0).sqrt()
        slope = G.mean(dim=1) + (c * mean / norm) * (G @ w)
        # At the minimum over the simplex the slope is least, and the same, wherever there is weight.
        tolerance = 1e-8 if kind == "a ratio of 1e12" else RESIDUAL
        scale = G.diagonal().sqrt() * (mean + c * mean) + w @ slope.abs()
        if w.min() >= 0 and (w @ slope - slope <= tolerance * scale).all():
            assert (extra @ G @ extra).clamp(min=0).sqrt() <= (1 + 1e-9) * c * mean + 1e-9 * size, kind
            continue
        # Else g_w is zero at the minimum, where the dual is: nowhere may it be negative. Then it is the direction
        # nearest to the mean gradient with which no task loses, and c < 1 leaves it a length.
        points = torch.cat([torch.eye(K), torch.rand(200, K) ** 8]).double()
        points = points / points.sum(dim=1, keepdim=True)
        lengths = ((points @ G) * points).sum(dim=1).clamp(min=0).sqrt()
        assert (points @ G.mean(dim=1) + c * mean * lengths).min() >= -1e-7 * size**2, kind
        way = (solved(DualProj(reg_eps=0.0), J, device) - 1 / K) @ J
        assert torch.allclose(extra @ J, way * (c * mean / way.norm()).clamp(max=1), atol=1e-6 * size), kind
        assert c >= 1 or (weights @ J).norm() >= (1 - c) * mean * (1 - 1e-6), kind


@pytest.mark.parametrize("num_tasks", TASKS)
def test_pcd_meets_every_demand_or_none(num_tasks, device):
    met = 0
    for kind, J in problems(num_tasks).items():
        if kind in ("huge", "tiny"):
            continue
        w = solved(PCD(tau=0.02, eps=0.0), J, device)
        norms = J.norm(dim=1)
        if not w.any() or torch.allclose(w[1:], torch.zeros(1, dtype=w.dtype)):
            continue
        met += 1
        unit = J / norms.clamp(min=1e-300)[:, None]
        multipliers = w * norms / (w[0] * norms[0])  # of the normalised problem, where the first task's is 1
        d = multipliers @ unit
        demands = 0.02 * (norms > 0)
        slack = (unit @ d - demands)[1:]
        scale = 1 + multipliers.sum()
        assert multipliers.min() >= 0
        assert (slack >= -1e-9 * scale).all(), kind
        assert ((slack * multipliers[1:]).abs() <= 1e-9 * scale**2).all(), kind
        assert (w @ J).norm().item() == pytest.approx(norms[0].item(), rel=1e-6)
    assert met > 0 or num_tasks == 1


def test_a_solve_that_gives_up_is_counted_and_its_best_iterate_returned(device):
    # No gradients have such products, and about half of the searches find no root.
    aggregator = CAGrad(0.5)
    matrices = torch.randn(100, 8, 8, dtype=torch.float64)
    weights = aggregator.weights((matrices + matrices.mT).to(device))
    assert weights.isfinite().all()
    assert 0 < aggregator.diagnostics()["unconverged"] < 100
    once = aggregator.diagnostics()["unconverged"]
    aggregator.weights((matrices + matrices.mT).to(device))
    assert aggregator.diagnostics()["unconverged"] == 2 * once
    aggregator.reset()
    assert aggregator.diagnostics()["unconverged"] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [1e2, 1e6])
def test_cagrad_takes_no_short_gradient_for_rounding(ratio, dtype, device):
    J = torch.randn(3, 1000, dtype=torch.float64)
    J[2] /= ratio
    rows, aggregator = J.to(device, dtype), CAGrad(0.5)
    (update,) = aggregator(mtlfast.TaskGradients.from_matrix(rows))
    wanted = CAGrad(0.5).weights(rows.double() @ rows.double().T) @ rows.double()
    assert (update.double() - wanted).norm() < 2 * torch.finfo(dtype).eps * wanted.norm() + 1e-12
    assert aggregator.diagnostics() == {"unconverged": 0, "decided_by_noise": 0}
