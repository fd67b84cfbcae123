"""CAGrad around a preferred combination of the gradients, and with weights clipped to the preferences (RACO)."""

import pytest
import torch
from test_methods import jacobian
from torch import Tensor

from mtlfast.aggregation import CAGrad


def test_by_hand(device):
    # g_0 = (0.8, 0.2), and c |g_0| = 3 / sqrt(10). At w = (1/4, 3/4) the slopes 0.8 + 0.3 and 0.2 + 0.9 are the same.
    J = torch.eye(2, dtype=torch.float64, device=device)
    c, u = (0.9 / 0.68) ** 0.5, [0.8, 0.2]
    assert CAGrad(c, pref_vector=u)(J).tolist() == pytest.approx([1.1, 1.1], abs=1e-12)
    # Clipped, w is (0.25, 0.2): the direction (5, 4) / sqrt(41).
    step = 3 / 10**0.5 / 41**0.5
    clipped = CAGrad(c, pref_vector=u, clip=True)(J)
    assert clipped.tolist() == pytest.approx([0.8 + 5 * step, 0.2 + 4 * step], abs=1e-12)
    # Without preferences each counts 1/2, and w is (1/2, 1/2), which no clipping changes.
    assert CAGrad(c, clip=True)(J).tolist() == pytest.approx(CAGrad(c)(J).tolist(), abs=1e-12)


def test_equal_preferences_are_none(device):
    for num_tasks in (1, 2, 5, 8):
        J = jacobian(num_tasks=num_tasks).to(device)
        equal = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
        wanted = CAGrad(0.5).weights(J @ J.mT)
        assert torch.allclose(CAGrad(0.5, pref_vector=equal).weights(J @ J.mT), wanted, atol=1e-9)


def preferences(num_tasks: int) -> Tensor:
    """Positive numbers that add up to 1."""
    drawn = torch.rand(num_tasks, dtype=torch.float64) + 0.05
    return drawn / drawn.sum()


def inner_weights(weights: Tensor, u: Tensor) -> Tensor:
    """The w of the update u J + c |u J| g_w / |g_w|."""
    return (weights - u) / (weights - u).sum()


@pytest.mark.native
@pytest.mark.parametrize("num_tasks", [2, 3, 8, 40])
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
def test_it_is_at_the_minimum_of_its_dual(num_tasks, c, device):
    for J in (jacobian(num_tasks=num_tasks), jacobian(num_tasks=num_tasks).abs()):
        G, u = J @ J.mT, preferences(num_tasks)
        weights = CAGrad(c, pref_vector=u).weights(G.to(device), rtol=1e-13).cpu()
        w, radius = inner_weights(weights, u), c * (u @ G @ u).sqrt()
        slope = G @ u + radius / (w @ G @ w).sqrt() * (G @ w)
        assert w.min() >= -1e-12
        assert (w @ slope - slope <= 1e-9 * G.diagonal().max()).all()
        assert ((weights - u) @ G @ (weights - u)).sqrt() == pytest.approx(float(radius), rel=1e-9)


@pytest.mark.native
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("c", [0.1, 0.9])
def test_clipping_takes_the_smaller_of_each_pair(num_tasks, c, device):
    smaller = 0
    for _ in range(10):
        J, u = jacobian(num_tasks=num_tasks), preferences(num_tasks)
        G = J @ J.mT
        w = inner_weights(CAGrad(c, pref_vector=u).weights(G, rtol=1e-13), u)
        smaller += bool((w > u + 1e-9).any())
        g = torch.minimum(w, u) @ J
        wanted = u @ J + c * (u @ J).norm() * g / g.norm()
        direction = CAGrad(c, pref_vector=u, clip=True).weights(G.to(device), rtol=1e-13).cpu() @ J
        assert torch.allclose(direction, wanted, atol=1e-8 * float(J.norm()))
    assert smaller > 0 or num_tasks == 1


def test_nothing_left_of_the_weighted_gradient_leaves_the_preferred_one(device):
    # All of w is on the second task, which has the preference 0.
    J = torch.tensor([[1.0, 0.0], [-0.1, 0.5]], dtype=torch.float64, device=device)
    aggregator = CAGrad(0.5, pref_vector=[1.0, 0.0], clip=True)
    assert aggregator.weights(J @ J.mT).tolist() == [1, 0]
    assert aggregator.diagnostics()["decided_by_noise"] == 0
    # A zero gradient takes all of w, and clipped it is still zero.
    J = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, device=device)
    assert CAGrad(0.5, clip=True).weights(J @ J.mT).tolist() == [0.5, 0.5]
    assert CAGrad(0.5, clip=True).weights(0 * J @ J.mT).tolist() == [0.5, 0.5]


def test_where_zero_is_optimal_the_clipped_weights_are_those_of_zero(device):
    # With c >= 1 no combination is better than one that is zero.
    J = jacobian(num_tasks=3)
    J[2] = -(0.2 * J[0] + 0.3 * J[1]) / 0.5
    u = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    g = torch.tensor([0.2, 0.1, 0.3], dtype=torch.float64) @ J  # the smaller of (0.2, 0.3, 0.5) and u
    wanted = u @ J + 2 * (u @ J).norm() * g / g.norm()
    aggregator = CAGrad(2.0, pref_vector=u, clip=True)
    direction = aggregator.weights((J @ J.mT).to(device)).cpu() @ J
    assert torch.allclose(direction, wanted, atol=1e-9 * float(J.norm()))
    assert aggregator.diagnostics() == {"unconverged": 0, "decided_by_noise": 1}


def test_preferences_are_the_tasks_own(device):
    J = jacobian(num_tasks=4).to(device)
    for clip in (False, True):
        aggregator = CAGrad(0.5, pref_vector=[0.4, 0.3, 0.2, 0.1], clip=clip)
        some = CAGrad(0.5, pref_vector=[0.3, 0.1], clip=clip).weights(J[1::2] @ J[1::2].mT)
        assert torch.equal(aggregator.weights(J[1::2] @ J[1::2].mT, tasks=(1, 3)), some)
        restored = CAGrad(0.5, pref_vector=[1.0, 0.0, 0.0, 0.0], clip=clip)
        restored.load_state_dict(CAGrad(0.5, pref_vector=[0.4, 0.3, 0.2, 0.1]).state_dict())
        assert torch.equal(restored.weights(J @ J.mT), aggregator.weights(J @ J.mT))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CAGrad(0.5, pref_vector=[0.5, -0.1]), "pref_vector is .*, expected K finite numbers of at least 0"),
        (lambda: CAGrad(0.5, clip=1), "CAGrad: clip is 1, expected False or True"),
        (
            lambda: CAGrad(0.5, pref_vector=[0.5, 0.5]).weights(torch.eye(3, dtype=torch.float64)),
            r"CAGrad: got tasks \[0, 1, 2\], expected 2 tasks as there are preferences",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
