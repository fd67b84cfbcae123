"""`diagnostics()` counts the solves that took something for zero since it is no larger than rounding."""

import pytest
import torch
from methods import METHODS, losses, numbers_of_tasks
from torch import Tensor

from mtlfast import ops, reference
from mtlfast.aggregation import PCD, Step
from mtlfast.aggregation._solved import SolvedAggregator

COUNTING = [
    name
    for name, method in METHODS.items()
    if "decided_by_noise" in getattr(method.make(), "counts", ())
    and 4 in numbers_of_tasks(method, 4)
    and "every other step" not in name  # which solves are due there depends on the weights
]
RANKS = ("AlignedMTL", "ConFIG", "IMTLG")


def gradients(kind: str) -> Tensor:
    """[4, 30] gradients; all but the independent ones leave some method something that is zero but for rounding."""
    J = torch.randn(4, 30, dtype=torch.float64)
    if kind == "dependent":
        J[3] = J[:3].sum(dim=0)
    elif kind == "opposite":
        J = torch.stack([J[0], -0.7 * J[0], J[0], -2 * J[0]])
    elif kind == "a zero row":
        J[2] = 0
    return J


def solve(aggregator: SolvedAggregator, J: Tensor, rtol: float, native: bool) -> None:
    """One solve, by the native solver or by its twin."""
    arguments = aggregator.solve_arguments(J @ J.mT, Step(len(J), losses(len(J)), rtol=rtol))
    if native:
        ops.solve(*arguments)
        return
    gram, method, params, inputs, state, tasks, _ = arguments
    reference.SOLVERS[method].run(reference.Group(J, params, inputs, state.view(-1), tasks, gram))


def test_the_methods_that_decide_so():
    assert {name.partition(",")[0] for name in COUNTING} >= {*RANKS, "CAGrad", "PCD", "NashMTL", "FairGrad", "GradVac"}
    for name in METHODS:
        aggregator = METHODS[name].make()
        if isinstance(aggregator, SolvedAggregator):
            takes = "rtol" in reference.SOLVERS[aggregator.method].params
            assert takes == ("decided_by_noise" in aggregator.counts), name


# By the kind of gradients, the methods that count their two solves there.
COUNTED = {
    "independent": (),
    "dependent": RANKS,
    "opposite": (*RANKS, "CAGrad, c = 2", "NashMTL", "FairGrad", "GradVac"),
    "a zero row": ("CAGrad",),  # zero is among the combinations of its gradients
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("kind", COUNTED)
def test_it_is_counted(kind, name, native):
    aggregator, J = METHODS[name].make(), gradients(kind)
    for _ in range(2):
        solve(aggregator, J, 1e-12, native)
    assert aggregator.diagnostics()["decided_by_noise"] == (2 if name.startswith(COUNTED[kind]) else 0)


@pytest.mark.parametrize("native", [True, False])
def test_pcd_counts_a_direction_that_cancels(native):
    aggregator, J = PCD(tau=0.0), torch.randn(1, 30, dtype=torch.float64)
    J = torch.cat([J, -0.7 * J])
    solve(aggregator, J, 1e-12, native)
    assert aggregator.diagnostics() == {"unconverged": 0, "decided_by_noise": 1}
