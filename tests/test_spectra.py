"""Aligned-MTL, IMTL-G and ConFIG beside singular values of the Jacobian itself, where G is nearly singular or is."""

import pytest
import torch
from test_methods import both_ways, jacobian
from torch import Tensor

from mtlfast.aggregation import IMTLG, AlignedMTL, ConFIG, GramAggregator

pytestmark = pytest.mark.native
EPS = torch.finfo(torch.float64).eps
METHODS = {"AlignedMTL": AlignedMTL, "IMTLG": IMTLG, "ConFIG": ConFIG}
every_method = pytest.mark.parametrize("name", METHODS)


def ill_conditioned(num_tasks: int, cond: float, unit: bool) -> Tensor:
    """A Jacobian with that condition number; with `unit` its rows have norm 1, and the number is about that."""
    left, right = (torch.linalg.qr(torch.randn(n, num_tasks, dtype=torch.float64))[0] for n in (num_tasks, 50))
    J = left * torch.logspace(0, -torch.tensor(cond).log10().item(), num_tasks, dtype=torch.float64) @ right.T
    for _ in range(5 if unit else 0):
        J = J / J.norm(dim=1, keepdim=True)
    return J


@pytest.mark.parametrize("cond", [1e1, 1e3, 1e5, 1e7])
@every_method
def test_error_is_that_of_the_squared_condition(name, cond, device):
    # The docstrings have the largest errors seen; they are about eps cond^2.
    for num_tasks in (3, 4, 8) * 5:
        J = ill_conditioned(num_tasks, cond, unit=name != "AlignedMTL")
        weights, twin = both_ways(METHODS[name](), (J @ J.T).to(device), J, rtol=num_tasks * EPS)
        assert (weights - twin).abs().max() <= 10 * EPS * cond**2 * twin.abs().max()


@every_method
def test_rank_is_the_rank_of_the_jacobian(name, device):
    for num_tasks, rank in ((2, 1), (3, 2), (8, 4), (8, 7), (40, 20)):
        for _ in range(10):
            J = jacobian(num_tasks=num_tasks, rank=rank)
            weights, twin = both_ways(METHODS[name](), (J @ J.T).to(device), J, rtol=1e-10)
            assert torch.allclose(weights @ J, twin @ J, rtol=0, atol=1e-8 * float((twin @ J).norm()))


@every_method
def test_float32_gradients_that_depend_on_each_other(name, device):
    # g_3 = g_1 + g_2 as float32 rounds it: G's third eigenvalue is rounding, and must not decide.
    wrong = 0
    for _ in range(10):
        J = torch.randn(3, 1000)
        J[2] = J[0] + J[1]
        exact = J.double()
        exact[2] = exact[0] + exact[1]
        aggregator: GramAggregator = METHODS[name]()
        update = aggregator(J.to(device)).cpu().double()
        _, twin = both_ways(METHODS[name](), exact @ exact.T, exact, rtol=1e-10)
        assert torch.allclose(update, twin @ exact, rtol=0, atol=1e-5 * float((twin @ exact).norm()))
        noise = 1 + 1e-8 * torch.randn(3, 3, dtype=torch.float64)
        gram = exact @ exact.T * (noise + noise.T) / 2
        careless = METHODS[name]().weights(gram.to(device), rtol=1e-16).cpu() @ exact
        wrong += float((careless - twin @ exact).norm() / (twin @ exact).norm()) > 0.1
    assert name != "AlignedMTL" or wrong > 0  # it does: without rtol the smallest singular value is rounding


@pytest.mark.parametrize("ratio", [1e-9, 1.0, 1e9])
def test_imtlg_projects_the_same_on_every_gradient_whatever_their_lengths(ratio, device):
    for num_tasks in (2, 3, 8, 40):
        J = jacobian(num_tasks=num_tasks)
        J[0] *= ratio
        weights = IMTLG().weights((J @ J.T).to(device)).cpu()
        assert weights.sum().item() == pytest.approx(1)
        projections = (J / J.norm(dim=1, keepdim=True)) @ (weights @ J)
        assert torch.allclose(projections, projections.mean().expand(num_tasks), rtol=1e-6)


@pytest.mark.parametrize("ratio", [1e-9, 1.0, 1e9])
def test_config_has_the_preferred_projections_and_the_length_of_all(ratio, device):
    for num_tasks in (2, 3, 8, 40):
        J = jacobian(num_tasks=num_tasks)
        J[0] *= ratio
        preferences = torch.rand(num_tasks, dtype=torch.float64) + 0.1
        for aggregator, wanted in ((ConFIG(), torch.ones(num_tasks).double()), (ConFIG(preferences), preferences)):
            update = aggregator.weights((J @ J.T).to(device)).cpu() @ J
            units, direction = J / J.norm(dim=1, keepdim=True), update / update.norm()
            assert torch.allclose(units @ direction / (units @ direction)[0], wanted / wanted[0], rtol=1e-6)
            assert update.norm().item() == pytest.approx((J @ direction).sum().item())


def test_config_lengths_by_hand(device):
    # Orthogonal gradients of lengths 1, 2 and 4: every cosine with the direction is 1 / sqrt(3).
    gram = torch.diag(torch.tensor([1.0, 4, 16], dtype=torch.float64)).to(device)
    typical = {"min": 1, "max": 4, "mean": 7 / 3, "geometric": 2, "harmonic": 3 / 1.75, "median": 2, 0: 1, 2: 4}
    for length, norm in {"projection": 7 / 3, **typical}.items():
        weights = ConFIG(length=length).weights(gram).cpu()
        assert torch.allclose(weights, norm * torch.tensor([1, 0.5, 0.25]).double()), length
    # Task 2 by its index where task 1 is absent; the first present one where task 2 is.
    for present, norm, inverse in (((0, 2), 4, [1, 0.25]), ((0, 1), 1, [1, 0.5])):
        some = gram[list(present)][:, list(present)]
        weights = ConFIG(length=2).weights(some, tasks=present).cpu()
        assert torch.allclose(weights, norm * torch.tensor(inverse, dtype=torch.float64))


def test_aligned_mtl_gives_all_singular_values_one_size(device):
    for num_tasks in (2, 3, 8, 40):
        J = jacobian(num_tasks=num_tasks)
        values = torch.linalg.svdvals(J).square()
        for mode, wanted in (("min", values.min()), ("median", values.median()), ("rmse", values.mean())):
            columns = [
                AlignedMTL(preference, mode).weights((J @ J.T).to(device)).cpu()
                for preference in torch.eye(num_tasks, dtype=torch.float64)
            ]
            balanced = torch.stack(columns, dim=1).T @ J
            expected = wanted.sqrt().expand(num_tasks)
            assert torch.allclose(torch.linalg.svdvals(balanced), expected, rtol=1e-9)


def test_opposite_gradients_give_imtlg_and_config_nothing(device):
    J = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64, device=device)
    for aggregator in (IMTLG(), ConFIG()):
        assert aggregator.weights(J @ J.T).tolist() == [0, 0]
