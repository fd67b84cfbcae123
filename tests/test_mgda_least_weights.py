"""MGDA with least weights: the shortest combination whose weights are no smaller."""

import copy

import pytest
import torch
from test_methods import hard_gradients, jacobian
from torch import Tensor

from mtlfast.aggregation import MGDA
from mtlfast.reference.nonnegative import project_onto_simplex


def test_by_hand(device):
    # Orthogonal gradients: w_i |g_i|^2 is the same for every task whose weight is not at its bound.
    gram = torch.tensor([1.0, 4.0, 4.0], dtype=torch.float64, device=device).diag()
    for least, wanted in (
        (0.0, [2 / 3, 1 / 6, 1 / 6]),
        (0.1, [2 / 3, 1 / 6, 1 / 6]),
        (0.25, [0.5, 0.25, 0.25]),
        (1 / 3, [1 / 3, 1 / 3, 1 / 3]),
        ([0.0, 0.0, 0.3], [0.56, 0.14, 0.3]),
        ([0.8, 0.0, 0.0], [0.8, 0.1, 0.1]),
        ([0.0, 0.3, 0.7], [0.0, 0.3, 0.7]),
    ):
        weights = MGDA(min_weights=least).weights(gram)
        assert weights.tolist() == pytest.approx(wanted, abs=1e-12), least


def test_without_bounds_it_is_mgda_to_the_bit(device):
    J = jacobian(5, num_tasks=6).to(device)
    for settings in ({}, {"norms": "l2"}, {"epsilon": 1e-3}):
        wanted = MGDA(**settings).weights(J @ J.mT)
        assert torch.equal(MGDA(**settings, min_weights=None).weights(J @ J.mT), wanted)
        assert torch.equal(MGDA(**settings, min_weights=0).weights(J @ J.mT), wanted)


@pytest.mark.native
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("part", [0.1, 0.6, 1.0])
def test_it_is_the_shortest(part, num_tasks, device):
    random = {"random": jacobian(num_tasks=num_tasks), "no conflict": jacobian(num_tasks=num_tasks).abs()}
    for kind, J in {**random, **hard_gradients(max(num_tasks, 2))}.items():
        G = J @ J.mT
        least = torch.rand(len(G), dtype=torch.float64)
        least[::3] = 0
        least = part * least / least.sum().clamp(min=1e-9)
        aggregator = MGDA(min_weights=least)
        w = aggregator.weights(G.to(device)).cpu()
        assert aggregator.diagnostics()["unconverged"] == 0
        assert (w >= least).all()
        assert w.sum().item() == pytest.approx(1, abs=1e-9)
        # Where a weight is above its bound, no task's gradient is shorter along the combination.
        slope = G @ w
        norms = G.diagonal().sqrt()
        scale = norms * (w @ norms) + w @ norms * norms.max() * (kind == "a ratio of 1e12")
        excess = (w - least) * (slope - slope.min())
        assert (excess <= 1e-10 * w.max() * scale.max().clamp(min=1e-300)).all(), kind


def two_steps(G: Tensor, least: Tensor) -> tuple[Tensor, bool]:
    """The paper's way (Section 4.2): the equations without v >= 0, then the nearest v; and whether that was needed."""
    K, left = len(G), 1 - least.sum()
    ones = torch.ones(K, 1, dtype=G.dtype)
    system = torch.cat([torch.cat([G, ones], dim=1), torch.cat([ones.T, torch.zeros(1, 1, dtype=G.dtype)], dim=1)])
    v = torch.linalg.solve(system, torch.cat([-G @ least, left[None]]))[:K]
    return least + left * project_onto_simplex(v / left), bool((v < 0).any())


def test_it_is_as_good_as_the_papers_two_steps_and_equal_where_those_are_exact():
    exact = 0
    for _ in range(100):
        J, least = jacobian(num_tasks=3), torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)
        G = J @ J.mT
        w, (theirs, projected) = MGDA(min_weights=least).weights(G), two_steps(G, least)
        assert w @ G @ w <= theirs @ G @ theirs * (1 + 1e-12)
        if not projected:
            exact += 1
            assert torch.allclose(w, theirs, atol=1e-9)
    assert 10 < exact < 90


def test_bounds_are_the_tasks_own(device):
    G = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64, device=device).diag()
    aggregator = MGDA(min_weights=[0.0, 0.5, 0.0, 0.2])
    alone = MGDA(min_weights=[0.5, 0.2]).weights(G[1::2, 1::2].contiguous())
    assert torch.equal(aggregator.weights(G[1::2, 1::2].contiguous(), tasks=(1, 3)), alone)
    mask = torch.tensor([False, True, False, True], device=device)
    assert aggregator.weights(G, mask=mask)[mask].tolist() == alone.tolist()
    restored = MGDA(min_weights=[0.25, 0.25, 0.25, 0.25])
    restored.load_state_dict(copy.deepcopy(aggregator.state_dict()))
    assert torch.equal(restored.weights(G), aggregator.weights(G))
    assert "min_weights=0.1" in repr(MGDA(min_weights=torch.tensor(0.1, dtype=torch.float64)))


def test_float32_bounds_that_add_up_to_one():
    w = MGDA(min_weights=torch.tensor([0.1, 0.2, 0.7])).weights(torch.eye(3, dtype=torch.float64))
    assert w.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=1e-7)
    MGDA(min_weights=1 / 49).weights(torch.eye(49, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MGDA(min_weights=-0.1), r"MGDA: min_weights is -0.1, expected a number in \[0, 1\]"),
        (lambda: MGDA(min_weights=True), r"MGDA: min_weights is True, expected a number in \[0, 1\]"),
        (lambda: MGDA(min_weights="all"), r"MGDA: min_weights is 'all', expected a number in \[0, 1\]"),
        (
            lambda: MGDA(min_weights=[0.5, -0.1]),
            r"min_weights is \[0.5, -0.1\], expected K finite numbers of at least 0",
        ),
        (lambda: MGDA(min_weights=[0.6, 0.6]), "MGDA: min_weights add up to 1.2, expected at most 1"),
        (lambda: MGDA(min_weights=torch.ones(1, 1)), r"min_weights has shape \[1, 1\], expected a number or \[K\]"),
        (
            lambda: MGDA(min_weights=0.4).weights(torch.eye(3, dtype=torch.float64)),
            "MGDA: min_weights is 0.4 for each of 3 tasks, expected at most 1 together",
        ),
        (
            lambda: MGDA(min_weights=[0.4, 0.1]).weights(torch.eye(3, dtype=torch.float64)),
            r"MGDA: got tasks \[0, 1, 2\], expected 2 tasks as there are least weights",
        ),
    ],
)
def test_bad_bounds(make, message):
    with pytest.raises(ValueError, match=message):
        make()
