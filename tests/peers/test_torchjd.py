"""Each aggregator beside an installed TorchJD, on 200 random matrices: the same update, to 1e-4.

Names and defaults are the same; where the methods differ on purpose, the row or the test says so.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtlfast.aggregation import (
    CRMOGM,
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    ConFIG,
    FairGrad,
    GradVac,
    GramAggregator,
    Krum,
    MoDo,
    NashMTL,
    PCGrad,
    Random,
    SDMGrad,
)
from mtlfast.compat.torchjd import CAGrad, DualProj, UPGrad  # with TorchJD's epsilons, relative to the trace

torchjd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")

pytestmark = pytest.mark.native  # the twins are compared with the solvers elsewhere
MATRICES = 200
TOLERANCE = 1e-4
PREFERENCES = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)

# name -> (ours, theirs, numbers of tasks)
PAIRS: dict[str, tuple[Callable[[], GramAggregator], Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "MGDA, Frank-Wolfe": (lambda: MGDA(epsilon=1e-3), torchjd.MGDAWeighting, (2, 3, 8, 20)),
    "CAGrad, c = 0.5": (lambda: CAGrad(0.5), lambda: torchjd.CAGradWeighting(c=0.5), (2, 3, 8)),
    "CAGrad, c = 2": (lambda: CAGrad(2.0), lambda: torchjd.CAGradWeighting(c=2.0), (2, 3, 8)),
    "UPGrad": (UPGrad, torchjd.UPGradWeighting, (1, 2, 3, 8, 20)),
    "UPGrad, preferring": (lambda: UPGrad(PREFERENCES), lambda: torchjd.UPGradWeighting(PREFERENCES), (4,)),
    "DualProj": (DualProj, torchjd.DualProjWeighting, (1, 2, 3, 8, 20)),
    "DualProj, preferring": (lambda: DualProj(PREFERENCES), lambda: torchjd.DualProjWeighting(PREFERENCES), (4,)),
    "PCD": (PCD, torchjd.PCDWeighting, (1, 2, 3, 8, 20)),
    "PCD, tau of each": (
        lambda: PCD(PREFERENCES[1:], beta=0.5),
        lambda: torchjd.PCDWeighting(PREFERENCES[1:], beta=0.5),
        (4,),
    ),
    # With n_byzantine = K - 3 two nearest neighbours tie, and either may win.
    "Krum": (lambda: Krum(1), lambda: torchjd.KrumWeighting(1), (5, 8, 20)),
    "Multi-Krum": (lambda: Krum(0, 3), lambda: torchjd.KrumWeighting(0, 3), (4, 8, 20)),
    **{
        f"AlignedMTL, {mode}": (
            lambda mode=mode: AlignedMTL(scale_mode=mode),
            lambda mode=mode: torchjd.AlignedMTLWeighting(scale_mode=mode),
            (1, 2, 3, 8, 20),
        )
        for mode in ("min", "median", "rmse")
    },
    "AlignedMTL, preferring": (
        lambda: AlignedMTL(PREFERENCES),
        lambda: torchjd.AlignedMTLWeighting(PREFERENCES),
        (4,),
    ),
    "IMTLG": (IMTLG, torchjd.IMTLGWeighting, (1, 2, 3, 8, 20)),
    **{
        f"FairGrad, {alpha:g}": (
            lambda alpha=alpha: FairGrad(alpha),
            lambda alpha=alpha: torchjd.FairGradWeighting(alpha),
            (2, 3, 8),
        )
        for alpha in (0.0, 0.5, 1.0, 2.0)
    },
    "CRMOGM": (
        lambda: CRMOGM(UPGrad()),
        lambda: torchjd.CRMOGMWeighting(torchjd.UPGradWeighting()),
        (2, 3, 8),
    ),
    "MoDo": (MoDo, torchjd.MoDoWeighting, (2, 3, 8, 20)),
    # At 20 tasks its steps of 10 go wild, and the last bits decide.
    "SDMGrad": (SDMGrad, torchjd.SDMGradWeighting, (2, 3, 8)),
    "SDMGrad, preferring": (
        lambda: SDMGrad(pref_vector=PREFERENCES),
        lambda: torchjd.SDMGradWeighting(pref_vector=PREFERENCES),
        (4,),
    ),
}


def jacobians(num_tasks: int, count: int):
    """Random normal float64 matrices, of which every fourth has not full rank."""
    torch.manual_seed(num_tasks)
    for n in range(count):
        J = torch.randn(num_tasks, num_tasks + 3, dtype=torch.float64)
        rank = max(1, num_tasks - 1)
        yield torch.randn(num_tasks, rank, dtype=torch.float64) @ J[:rank] if n % 4 == 3 else J


@pytest.mark.parametrize("name", PAIRS)
def test_same_update(name):
    make, make_theirs, tasks = PAIRS[name]
    for num_tasks in tasks:
        ours, theirs = make(), make_theirs()
        for J in jacobians(num_tasks, math.ceil(MATRICES / len(tasks))):
            gram = J @ J.T
            if name.startswith(("MoDo", "SDMGrad")):
                gram = J @ (J + 0.5 * torch.randn_like(J)).T
            if name.startswith("SDMGrad"):
                gram *= 1e6  # TorchJD adds 1e-8 to a square of the gradients' length, and 20 steps amplify it
            update = ours.weights(gram, rtol=1e-14) @ J  # where weights are not unique, the update is
            if name.startswith("FairGrad") and sum(ours.diagnostics().values()):
                ours.reset()  # its equations have no solution, and TorchJD returns its last iterate
                continue
            wanted = theirs(gram) @ J
            # TorchJD's CAGrad is as exact as its convex solver; the next test shows whose optimum is lower.
            tolerance = 10 * TOLERANCE if name.startswith("CAGrad") else TOLERANCE
            assert torch.allclose(update, wanted, rtol=0, atol=tolerance), (num_tasks, J)


@pytest.mark.parametrize("preferences", [None, PREFERENCES])
def test_config_gives_the_same_update(preferences):
    for num_tasks in (1, 2, 3, 4, 8, 20) if preferences is None else (4,):
        for J in jacobians(num_tasks, MATRICES // (6 if preferences is None else 1)):
            update = ConFIG(preferences).weights(J @ J.T, rtol=1e-14) @ J
            assert torch.allclose(update, torchjd.ConFIG(preferences)(J), rtol=0, atol=TOLERANCE), (num_tasks, J)


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
def test_nash_mtl_gives_the_same_update_where_torchjd_solves_its_equations():
    # TorchJD runs at most 20 convex programs. At 8 tasks one case in four has not reached the solution then.
    def residual(J: Tensor, w: Tensor) -> float:
        gram = J @ J.T
        return float((w * (gram @ w) - 1).abs().max())

    solved = tried = 0
    for num_tasks in (2, 3, 8):
        ours, theirs = NashMTL(max_norm=0), torchjd.NashMTL(num_tasks, max_norm=0.0)
        for J in jacobians(num_tasks, MATRICES // 3):
            weights = ours.weights(J @ J.T, rtol=1e-14)
            if sum(ours.diagnostics().values()):
                ours.reset()
                continue
            tried += 1
            wanted = theirs.weighting(J)
            assert residual(J, weights) < 1e-10
            if residual(J, wanted) < 1e-3:
                solved += 1
                assert torch.allclose(weights, wanted, rtol=1e-2), (num_tasks, J)
    assert solved > 0.6 * tried > MATRICES / 3


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_cagrads_dual_is_no_higher(c):
    def dual(G: Tensor, weights: Tensor) -> float:
        w = (weights - 1 / len(G)).clamp(min=0)  # what CAGrad adds to the mean is the minimiser, times a number
        w = w / w.sum()
        return float(w @ G.mean(dim=1) + c * (G.mean() * (w @ G @ w)).clamp(min=0).sqrt())

    lower = 0
    for num_tasks in (2, 3, 8):
        for J in jacobians(num_tasks, MATRICES // 3):
            gram = J @ J.T
            ours, theirs = CAGrad(c).weights(gram), torchjd.CAGradWeighting(c=c)(gram)
            if ours.any() and theirs.any():
                assert dual(gram, ours) <= dual(gram, theirs) + 1e-12 * float(gram.trace())
                lower += dual(gram, ours) < dual(gram, theirs)
    assert lower > MATRICES // 4


@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_same_update_when_the_orders_are_the_same(name, monkeypatch):
    # TorchJD draws each gradient's order with torch.randperm; here it gets the order that our keys give.
    for num_tasks in (1, 2, 3, 8):
        ours = {"PCGrad": PCGrad, "GradVac": GradVac}[name](generator=torch.Generator())
        theirs = {"PCGrad": torchjd.PCGradWeighting, "GradVac": torchjd.GradVacWeighting}[name]()
        for J in jacobians(num_tasks, MATRICES // 4):
            gram = J @ J.T
            ours.generator.manual_seed(7)
            keys = torch.rand(num_tasks, num_tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
            # PCGrad draws an order of all tasks and passes i by, GradVac one of the others' list.
            rows = [row if name == "PCGrad" else torch.cat([row[:i], row[i + 1 :]]) for i, row in enumerate(keys)]
            draws = iter([row.argsort() for row in rows])
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randperm", lambda *args, draws=draws, **kwargs: next(draws))
                wanted = theirs(gram)
            assert torch.allclose(ours.weights(gram) @ J, wanted @ J, rtol=0, atol=TOLERANCE), (num_tasks, J)


def test_random_weights_are_drawn_alike():
    for seed in range(MATRICES):
        torch.manual_seed(seed)
        ours = Random().weights(torch.eye(5, dtype=torch.float64))
        torch.manual_seed(seed)
        assert torch.equal(ours, torchjd.RandomWeighting()(torch.ones(5, 3, dtype=torch.float64)))
