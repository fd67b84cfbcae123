"""TorchJD's float32 updates under `accelerate()`, and those of the faces, are as right as its own code's in float64.

As tests/test_float32.py, which says more.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import ModuleType

import pytest
import torch
from stability import KINDS, Problem, Tally, gradients, problems
from torch import Tensor, nn

from mtlfast.compat import torchjd as face
from mtlfast.compat.torchjd import accelerate, restore

jd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")
autojac = pytest.importorskip("torchjd.autojac", reason="needs the optional group peers")
pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem"),
]

# What accelerate() serves.
MAKE: dict[str, Callable[[ModuleType], nn.Module]] = {
    "PCGrad": lambda module: module.PCGrad(),
    "GradVac": lambda module: module.GradVac(),
    "MGDA": lambda module: module.MGDA(),
    "CAGrad": lambda module: module.CAGrad(c=0.5),
    "UPGrad": lambda module: module.UPGrad(),
    "DualProj": lambda module: module.DualProj(),
    "AlignedMTL": lambda module: module.AlignedMTL(),
    "AlignedMTL, rmse": lambda module: module.AlignedMTL(scale_mode="rmse"),
    "IMTLG": lambda module: module.IMTLG(),
    "Krum": lambda module: module.Krum(1),
    "FairGrad": lambda module: module.FairGrad(alpha=1.0),
    "ConFIG": lambda module: module.ConFIG(),
}
DRAWING = ("PCGrad", "GradVac")  # whose faces draw their orders otherwise
# TorchJD's solvers stop up to 1e-3 before the optimum: there `accelerate()` in float64 stands for it.
STOPPING = ("CAGrad", "FairGrad")


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    restore()


def on_matrix(aggregator: nn.Module, J: Tensor, on: bool = False) -> Tensor:
    torch.manual_seed(0)
    with accelerate() if on else nullcontext():
        return aggregator(J).double()


def in_jac_to_grad(aggregator: nn.Module, J: Tensor, optimised: bool = False) -> Tensor:
    p = nn.Parameter(J[0].clone())
    p.jac = J
    torch.manual_seed(0)
    with accelerate():
        autojac.jac_to_grad([p], aggregator, optimize_gramian_computation=optimised)
    return p.grad.double()


def methods_for(problem: Problem) -> list[str]:
    """The names of those that take so many tasks."""
    return [name for name in MAKE if name != "Krum" or problem.num_tasks > 4]


def ways(name: str, problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """All that can be called with a problem's Jacobian -> what returns the direction."""
    make, J = MAKE[name], problem.rows
    found = {}
    if not (name == "ConFIG" and problem.kind == "nearly parallel" and problem.numel > 1000):  # see the next test
        found["on a matrix"] = lambda: on_matrix(make(jd), J, on=True)
        found["in jac_to_grad"] = lambda: in_jac_to_grad(make(jd), J)
    if name != "ConFIG":
        found["in jac_to_grad, optimised"] = lambda: in_jac_to_grad(make(jd), J, optimised=True)
    if name not in DRAWING:
        found["a face"] = lambda: on_matrix(make(face), J)
        found["a face in jac_to_grad"] = lambda: in_jac_to_grad(make(face), J)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_right_as_in_float64(kind, record_property):
    tally = Tally()
    for problem in problems(kind, torch.float32, 3, (16, 10_000)):
        # Of one parameter, the rounded Gram matrix of GradVac's and TorchJD's epsilons are all that is left.
        for name in [] if problem.numel == 1 else methods_for(problem):
            update = partial(lambda make, on, J, gram: on_matrix(make(jd), J, on), MAKE[name], name in STOPPING)
            tally.judge(name, problem, update, ways(name, problem))
    record_property("stable", str(tally))
    tally.check()


def test_config_cuts_off_where_torchjds_does():
    # The cutoff of its pseudo-inverse is the number of columns times eps: that takes these gradients for parallel.
    J = gradients("nearly parallel", 4, 10_000, torch.Generator().manual_seed(0)).float()
    wanted = on_matrix(jd.ConFIG(), J)
    assert (on_matrix(jd.ConFIG(), J, on=True) - wanted).norm() < 1e-5 * wanted.norm()
    assert (wanted - on_matrix(jd.ConFIG(), J.double())).norm() > 1e-3 * wanted.norm()
