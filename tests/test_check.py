"""A method that refuses a step does so before the first backward pass and before any state changes."""

import copy

import pytest
import torch
from methods import METHODS
from passes import Counted
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import (
    CRMOGM,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ClipNorm,
    Compose,
    ConFIG,
    Constant,
    CrossNorm,
    DualProj,
    FairGrad,
    GradVac,
    GramAggregator,
    Krum,
    Mean,
    MetaBalance,
    MoDo,
    NashMTL,
    NormBalance,
    PCGrad,
    SDMGrad,
    UPGrad,
)
from mtlfast.aggregation._grouped_state import GroupedState
from mtlfast.weighting import SoftAdapt

TWO = torch.tensor([0.5, 0.5])
TOO_LARGE = {"loss_scale": torch.ones(2)}

# What is refused in a step of three tasks: the method, the other arguments of the step, the error.
REFUSALS = {
    "MoDo": (MoDo, {}, r"MoDo: got the gradients of one batch, expected those of two"),
    "SDMGrad": (SDMGrad, {}, "SDMGrad: got the gradients of one batch"),
    "CRMOGM of MoDo": (lambda: CRMOGM(MoDo()), {}, "MoDo: got the gradients of one batch"),
    "Compose with SDMGrad": (lambda: Compose(NormBalance(), SDMGrad()), {}, "SDMGrad: got the gradients of one batch"),
    "Compose of MoDo": (lambda: Compose(MoDo(), GradVac()), {}, "MoDo: got the gradients of one batch"),
    "Constant": (lambda: Constant(TWO), {}, r"Constant: got tasks \[0, 1, 2\], expected 2 tasks as there are weights"),
    "UPGrad": (lambda: UPGrad(TWO), {}, "UPGrad: got tasks .*, expected 2 tasks as there are preferences"),
    "DualProj": (lambda: DualProj(TWO), {}, "DualProj: got tasks"),
    "AlignedMTL": (lambda: AlignedMTL(TWO), {}, "AlignedMTL: got tasks"),
    "ConFIG": (lambda: ConFIG(TWO), {}, "ConFIG: got tasks"),
    "PCD": (lambda: PCD(torch.tensor([0.1])), {}, "PCD: got tasks .*, expected 2 tasks as there are shares"),
    "CRMOGM": (lambda: CRMOGM(GradVac(), initial_weights=TWO), {}, "CRMOGM: got tasks"),
    "CRMOGM of Krum": (lambda: CRMOGM(Krum(1)), {}, "Krum: got 3 tasks, expected at least 4"),
    "Krum": (lambda: Krum(1), {}, "Krum: got 3 tasks, expected at least 4"),
    "Compose of GradVac and Krum": (lambda: Compose(GradVac(), Krum(1)), {}, "Krum: got 3 tasks"),
    "CrossNorm": (CrossNorm, {}, "CrossNorm: got 3 tasks, expected at most 2"),
    "NormBalance": (lambda: NormBalance(3), {}, "NormBalance: got 3 tasks, expected task 3 among them"),
    "MetaBalance": (lambda: MetaBalance(main_task=3), {}, "MetaBalance: got 3 tasks, expected task 3 among them"),
    "ConFIG, as the fourth": (lambda: ConFIG(length=3), {}, "ConFIG: got 3 tasks, expected task 3 among them"),
    "PCGrad, protecting": (lambda: PCGrad(protected=[3]), {}, "PCGrad: got 3 tasks, expected task 3 among them"),
    "MGDA, least weights": (lambda: MGDA(min_weights=0.4), {}, "MGDA: min_weights is 0.4 for each of 3 tasks"),
    "MGDA, least weights of each": (lambda: MGDA(min_weights=TWO), {}, "MGDA: got tasks .* as there are least weights"),
    "CAGrad": (lambda: CAGrad(0.5, pref_vector=TWO), {}, "CAGrad: got tasks .* as there are preferences"),
    "NashMTL": (lambda: NashMTL(n_tasks=2), {}, "NashMTL: got 3 tasks, expected at most 2 as n_tasks says"),
    "NashMTL, scale": (NashMTL, TOO_LARGE, r"NashMTL: loss_scale has shape \[2\], expected a number"),
    "FairGrad, scale": (lambda: FairGrad(1.0), TOO_LARGE, r"FairGrad: loss_scale has shape \[2\]"),
    "ClipNorm, scale": (lambda: ClipNorm(1.0), TOO_LARGE, r"ClipNorm: loss_scale has shape \[2\]"),
}


class Net(nn.Module):
    """A trunk and three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(3))

    def losses(self) -> list[Tensor]:
        features = self.trunk(torch.ones(2, 4))
        return [Counted.apply(head(features).square().mean()) for head in self.heads]


def state_of(*modules: nn.Module) -> list[dict]:
    return copy.deepcopy([module.state_dict() for module in modules])


def same(before: list[dict], after: list[dict]) -> bool:
    for a, b in zip(before, after, strict=True):
        if a.keys() != b.keys() or not all(
            (x is None and y is None) or torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
            for x, y in zip(a.values(), b.values(), strict=True)
        ):
            return False
    return True


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_comes_before_anything_happens(name):
    make, given, message = REFUSALS[name]
    net, aggregator, weighting = Net(), make(), SoftAdapt(3)
    losses = net.losses()
    before, drawn = state_of(aggregator, weighting), torch.get_rng_state()
    Counted.passes = 0
    with pytest.raises((ValueError, TypeError), match=message):
        mtlfast.backward(losses, aggregator, shared=net.trunk.parameters(), weighting=weighting, **given)
    assert Counted.passes == 0
    assert same(before, state_of(aggregator, weighting))
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    # The graph is still there: a method that accepts the step trains on it.
    mtlfast.backward(losses, Mean(), shared=net.trunk.parameters(), weighting=weighting)
    assert Counted.passes == 3


@pytest.mark.parametrize("name", REFUSALS)
def test_a_call_by_hand_refuses_the_same_before_it_reads_the_gradients(name, monkeypatch):
    make, given, message = REFUSALS[name]
    aggregator = make()
    before = state_of(aggregator)
    monkeypatch.setattr(mtlfast.ops, "gram", None)  # a call would raise a TypeError with another message
    monkeypatch.setattr(mtlfast.ops, "norms", None)
    with pytest.raises((ValueError, TypeError), match=message):
        aggregator(torch.randn(3, 5), **given)
    assert same(before, state_of(aggregator))


def test_losses_that_are_not_there_are_missed_before_the_gradients_are_read(monkeypatch):
    monkeypatch.setattr(mtlfast.ops, "gram", None)
    with pytest.raises(ValueError, match="MGDA: norms is 'loss' and losses is None, expected the tasks' losses"):
        MGDA(norms="loss")(torch.randn(3, 5))


def test_the_table_has_every_class_that_refuses_anything():
    alike = (GramAggregator.check, GroupedState.check)  # the latter refuses other groups: tests/test_groups.py
    refusing = {type(row.make()) for row in METHODS.values() if type(row.make()).check not in alike}
    refusing |= {MoDo, SDMGrad}  # by what they read
    assert refusing - {type(make()) for make, *_ in REFUSALS.values()} <= {MGDA, PCGrad}
