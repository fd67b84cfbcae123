"""After any step all ranks have the same gradients, weights and state, bit by bit, whatever differed between them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from ranked import on_ranks
from ranked_arguments import Step, closures, equal, without
from torch import distributed, nn

import mtlfast
from mtlfast.aggregation import (
    MGDA,
    ExcessMTL,
    GradDrop,
    GradVac,
    MoCo,
    NashMTL,
    PCGrad,
    PseudoMomentum,
    TrimmedMean,
    UPGrad,
)
from mtlfast.weighting import DWA, Random

RANKS = 3


class Case(NamedTuple):
    """Steps that all ranks take.

    Attributes:
        options: the arguments of `Step` by rank, each of which has random numbers of its own.
        steps: their number.
    """

    options: Callable[[int], dict[str, Any]]
    steps: int = 3


def of_some_ranks(rank):
    """A rank has all tasks, another one some, and another one none."""
    return (list, without(1), without(0, 1, 2))[rank]


CASES = {
    "NashMTL": Case(lambda rank: {"method": NashMTL()}),
    "GradVac": Case(lambda rank: {"method": GradVac()}),
    "GradVac, own generator": Case(lambda rank: {"method": GradVac(generator=torch.Generator().manual_seed(rank))}),
    "GradDrop": Case(lambda rank: {"method": GradDrop()}),
    "MoCo": Case(lambda rank: {"method": MoCo()}),
    "ExcessMTL": Case(lambda rank: {"method": ExcessMTL()}),
    "DWA": Case(lambda rank: {"weighting": DWA(3)}),
    "Random": Case(lambda rank: {"weighting": Random(), "method": PCGrad()}),
    "float32": Case(lambda rank: {"weighting": DWA(3), "method": PCGrad(), "dtype": torch.float32}),
    "absent": Case(lambda rank: {"losses": of_some_ranks(rank), "ddp": True, "method": NashMTL(), "weighting": DWA(3)}),
    "absent, float32": Case(
        lambda rank: {"losses": of_some_ranks(rank), "ddp": True, "weighting": DWA(3), "dtype": torch.float32}
    ),
    "absent, closures": Case(
        lambda rank: {
            "losses": (closures, lambda losses: [closures(losses)[0], None, None], without(0, 1, 2))[rank],
            "ddp": True,
            "weighting": DWA(3),
            "retain_graph": True,
            "dtype": torch.float32,
        }
    ),
    "auto": Case(lambda rank: {"jacobian": "auto"}),
}


def after_steps(rank):
    found = {}
    for name, case in CASES.items():
        step = Step(rank, **case.options(rank))
        for _ in range(case.steps):
            result = step.run()
        found[name] = step.gradients(), [result.weights, result.losses], step.state()
    return found


def times_nan(rank, losses):
    return [losses[0] * (float("nan") if rank == 1 else 1.0), *losses[1:]]


METHODS = {
    "UPGrad": UPGrad,
    "NashMTL": NashMTL,
    "GradVac": GradVac,
    "MoCo": MoCo,
    "ExcessMTL": ExcessMTL,
    "PseudoMomentum": partial(PseudoMomentum, 3),
    "MGDA": MGDA,
    "TrimmedMean": partial(TrimmedMean, 1),
}


def not_finite(rank, where):
    """A step in which a loss of rank 1, or one element of one of its gradients, is NaN, after an ordinary one."""
    found = {}
    for name, method in METHODS.items():
        step = Step(rank, method=method())
        step.run()
        before = step.state()
        for p in step.net.parameters():
            p.grad = None
        if where == "loss":
            step.losses = partial(times_nan, rank)
        elif rank == 1:
            step.shared[1].register_hook(lambda g: g.index_fill(0, torch.tensor(4), float("nan")))
        step.run()
        shared = [p.grad for p in step.shared]
        found[name] = shared, equal([x for _, x in before], [x for _, x in step.state()]), step.state()
    return found


def scaled(rank):
    """Training with a GradScaler in which rank 1 has a gradient that is not finite in the second step."""
    step, scaler = Step(rank), torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(step.net.parameters(), 0.1)
    scales = []
    for number in range(3):
        optimizer.zero_grad()
        step.losses = lambda losses, number=number: [
            scaler.scale(loss) * (float("inf") if (number, rank, k) == (1, 1, 2) else 1)
            for k, loss in enumerate(losses)
        ]
        step.arguments["loss_scale"] = scaler.get_scale()
        step.run()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, [p.detach().clone() for p in step.net.parameters()]


def without_heads(rank):
    """Losses of the shared parameters alone, of which ranks have different ones, with a plain process group."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x = torch.randn(RANKS, 5, 4, dtype=torch.float64)
    losses = of_some_ranks(rank)(list(net(x[rank]).square().mean(dim=0)))
    mtlfast.backward(losses, UPGrad(), shared=net, process_group=distributed.group.WORLD)
    return [p.grad for p in net.parameters()]


def program(rank, ranks):
    return {
        "steps": after_steps(rank),
        "NaN in a loss": not_finite(rank, "loss"),
        "NaN in one element": not_finite(rank, "element"),
        "scaled": scaled(rank),
        "without heads": without_heads(rank),
    }


@pytest.fixture(scope="module")
def results():
    return on_ranks(RANKS, program)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_agree(results, name):
    first, *others = (of_rank["steps"][name] for of_rank in results)
    for other in others:
        assert equal(first[0], other[0])
        assert all(a is None or torch.equal(a, b) for a, b in zip(first[1], other[1], strict=True))
        assert [n for n, _ in first[2]] == [n for n, _ in other[2]]
        assert equal([x for _, x in first[2]], [x for _, x in other[2]])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("where", ["NaN in a loss", "NaN in one element"])
def test_what_is_not_finite_on_one_rank_is_so_on_all(results, where, name):
    first, *others = (of_rank[where][name] for of_rank in results)
    element_wise = name == "TrimmedMean"  # which rank 1 alone makes NaN, where it has gradients
    for gradients, state_stays, state in (first, *others):
        assert any(x.isnan().any() for x in gradients)
        assert element_wise or all(x.isnan().all() for x in gradients)
        assert state_stays
        assert equal(gradients, first[0])
        assert equal([x for _, x in state], [x for _, x in first[2]])


def test_a_grad_scaler_skips_the_step_on_all_ranks(results):
    for scales, parameters in (of_rank["scaled"] for of_rank in results):
        assert scales == [64.0, 32.0, 32.0]
        assert all(x.isfinite().all() for x in parameters)
        assert equal(parameters, results[0]["scaled"][1])


def test_tasks_without_heads_may_be_absent_with_a_plain_group(results):
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    x = torch.randn(RANKS, 5, 4, dtype=torch.float64)
    of_ranks = [of_some_ranks(rank)(list(net(x[rank]).square().mean(dim=0))) for rank in range(RANKS)]
    losses = [sum(x for x in of_task if x is not None) / RANKS for of_task in zip(*of_ranks, strict=True)]
    mtlfast.backward(losses, UPGrad(), shared=net)
    for of_rank in results:
        for p, found in zip(net.parameters(), of_rank["without heads"], strict=True):
            assert torch.allclose(p.grad, found, rtol=0, atol=1e-9)
