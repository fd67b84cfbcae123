"""Nash-MTL and FairGrad: their equations are solved, to relative residuals of 1e-10, wherever they have a solution."""

import pytest
import torch
from test_methods import hard_gradients, jacobian
from test_optimality import TASKS, problems
from torch import Tensor

import mtlfast
from mtlfast.aggregation import MGDA, FairGrad, NashMTL

pytestmark = pytest.mark.native
RESIDUAL = 1e-10
RTOL = 1e-13


def shortest(J: Tensor) -> float:
    """The least |w U|^2 over the simplex for the unit gradients U that are not zero."""
    units = J[J.norm(dim=1) > 0]
    units = units / units.norm(dim=1, keepdim=True)
    w = MGDA().weights(units @ units.T)
    return float(w @ units @ units.T @ w)


def residual(J: Tensor, w: Tensor, alpha: float) -> float:
    """The largest |w_i (G w)_i - w_i^(1 - 1/alpha)|, relative to its terms, among tasks whose weight matters."""
    G = J @ J.T
    terms = w * (G.abs() @ w)
    wanted = w ** (1 - 1 / alpha)
    # A share below 1e-30 is zero in any sum; how far below, its weight need not tell.
    with_a_say = w * J.norm(dim=1) > 1e-30 * (w * J.norm(dim=1)).max()
    return float(((w * (G @ w) - wanted).abs() / (terms + wanted))[with_a_say].max())


@pytest.mark.parametrize("num_tasks", TASKS)
def test_nash_mtl_solves_its_equations(num_tasks, device):
    solved = 0
    for kind, J in problems(num_tasks).items():
        aggregator = NashMTL(max_norm=0)
        w = aggregator.weights((J @ J.T).to(device), rtol=RTOL).cpu()
        if not J.any():
            assert not w.any()
            continue
        if aggregator.diagnostics()["unconverged"]:
            # A combination is zero, and the update is MGDA's.
            assert shortest(J) < 1e-12, kind
            assert (w @ J).norm() < 1e-5 * J.norm(), kind
            assert w.sum().item() == pytest.approx(1)
            continue
        solved += 1
        some = J.norm(dim=1) > 0
        assert not w[~some].any()
        assert (w[some] > 0).all()
        size = float(J.norm())
        assert residual(J[some] / size, w[some] * size, 1.0) <= RESIDUAL, kind
    assert solved >= 4


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5, 1.0, 1.5, 2.0, 5.0, 10.0, 100.0])
@pytest.mark.parametrize("num_tasks", TASKS)
def test_fairgrad_solves_its_equations(num_tasks, alpha, device):
    solved = 0
    for kind, J in problems(num_tasks).items():
        if kind in ("tiny", "huge") and not 0.5 <= alpha <= 2:
            continue  # weights beyond float64's range
        aggregator = FairGrad(alpha)
        w = aggregator.weights((J @ J.T).to(device), rtol=RTOL).cpu()
        if not J.any():
            assert not w.any()
            continue
        if aggregator.diagnostics()["unconverged"]:
            assert shortest(J) < 1e-12, kind
            continue
        solved += 1
        some = J.norm(dim=1) > 0
        # Lengths near 1, of which no power leaves float64's range; the equations are those of the scaled gradients.
        size = float(J.norm())
        scaled = w[some] * size ** (2 / (1 + 1 / alpha))
        assert residual(J[some] / size, scaled, alpha) <= RESIDUAL, kind
    assert solved >= 4


def test_fairgrad_meets_its_limits(device):
    J = jacobian(num_tasks=4)
    gram = (J @ J.T).to(device)
    nash, fair = NashMTL(max_norm=0).weights(gram), FairGrad(1.0).weights(gram)
    assert torch.allclose(nash, fair, rtol=1e-9)
    assert FairGrad(0.0).weights(gram).tolist() == [0.25] * 4
    # The larger alpha is, the more alike are the gains, to MGDA's: equal where a task has a weight.
    mgda, fair = MGDA().weights(gram), FairGrad(500.0).weights(gram)
    assert torch.allclose(mgda, fair / fair.sum(), atol=0.01)


def test_nash_mtl_by_hand(device):
    # w_i = 1 / |g_i|, an update of length sqrt(2).
    gram = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)).to(device)
    expected = torch.tensor([0.5, 1.0]).double()
    assert torch.allclose(NashMTL(max_norm=0).weights(gram).cpu(), expected)
    assert torch.allclose(NashMTL().weights(gram).cpu(), expected / 2**0.5)
    assert torch.allclose(NashMTL(max_norm=5.0).weights(gram).cpu(), expected)


def test_nash_mtl_with_bargaining_powers(device):
    J = jacobian(num_tasks=4)
    gram, p = (J @ J.T).to(device), torch.tensor([0.1, 2.0, 0.5, 1.4])
    w = NashMTL(max_norm=0, pref_vector=p).weights(gram, rtol=RTOL).cpu()
    assert torch.allclose(w * (J @ J.T @ w), p.double())
    assert torch.allclose(NashMTL(max_norm=0, pref_vector=3 * p).weights(gram, rtol=RTOL).cpu(), w)
    # Equal preferences change nothing, absent tasks' are left out, and loss_scale works with preferences.
    equal = NashMTL(pref_vector=torch.full((4,), 0.3)).weights(gram)
    assert torch.allclose(equal, NashMTL().weights(gram))
    present = NashMTL(max_norm=0, pref_vector=p).weights(gram[:2, :2], tasks=(1, 3), rtol=RTOL).cpu()
    assert torch.allclose(present * (gram[:2, :2].cpu() @ present), 2 * p[[1, 3]].double() / 3.4)
    both = NashMTL(pref_vector=p)
    assert torch.allclose(both.weights(gram * 64, loss_scale=8.0), NashMTL(pref_vector=p).weights(gram))
    with pytest.raises(ValueError, match=r"NashMTL: got tasks \[0, 1, 2\], expected 4 tasks as there are preferences"):
        both.weights(gram[:3, :3])


def test_nash_mtl_keeps_its_weights_between_updates(device):
    grams = [(J @ J.T).to(device) for J in (jacobian(num_tasks=3) for _ in range(5))]
    every, third = NashMTL(max_norm=0), NashMTL(max_norm=0, update_weights_every=3)
    fresh, kept = ([aggregator.weights(gram) for gram in grams] for aggregator in (every, third))
    assert [torch.equal(a, b) for a, b in zip(fresh, kept, strict=True)] == [True, False, False, True, False]
    assert torch.equal(kept[1], kept[0])
    assert torch.equal(kept[4], kept[3])
    # Kept weights are shortened anew, for the gradients as they are now.
    short = NashMTL(update_weights_every=2)
    short.weights(grams[0])
    w = short.weights(grams[1])
    assert (w @ grams[1] @ w).sqrt().item() == pytest.approx(1)
    # A step that is not finite is no step.
    third.weights(grams[0] * torch.nan)
    assert torch.equal(third.weights(grams[0]), kept[4])
    # A task that was not there when they were made: new ones for all.
    late = NashMTL(max_norm=0, update_weights_every=10)
    late.weights(grams[0][:2, :2], tasks=(0, 1))
    assert torch.equal(late.weights(grams[0]), fresh[0])


@pytest.mark.parametrize("kind", ["opposite", "half the rank", "float32's rounding"])
def test_without_a_solution_the_weights_are_mgdas_and_that_is_counted(kind, device):
    J = hard_gradients(8)[kind]
    if kind == "half the rank":
        J[0] = -J[1:].sum(dim=0)
    if kind == "float32's rounding":
        J[0] = -J[1].float().double() * (1 + 1e-7)
    gram = (J @ J.T).to(device)
    for aggregator in (NashMTL(), FairGrad(2.0)):
        update = mtlfast.TaskGradients.from_matrix(J.to(device))
        for count in (1, 2):
            weights = aggregator.weights(gram)
            assert torch.equal(weights, MGDA().weights(gram))
            assert aggregator.diagnostics() == {"unconverged": count, "decided_by_noise": count}
        (direction,) = aggregator(update)
        assert direction.norm() < 1e-6 * J.norm()
        aggregator.reset()
        assert aggregator.diagnostics() == {"unconverged": 0, "decided_by_noise": 0}


def test_nash_mtl_knows_its_number_of_tasks(device):
    aggregator, gram = NashMTL(n_tasks=3), torch.eye(3, dtype=torch.float64, device=device)
    aggregator.weights(gram[:2, :2], tasks=(0, 2))
    state = aggregator.state
    aggregator.weights(gram)
    assert aggregator.state is state  # it did not grow
    with pytest.raises(ValueError, match="NashMTL: got 4 tasks, expected at most 3 as n_tasks says"):
        aggregator.weights(torch.eye(4, dtype=torch.float64, device=device))
