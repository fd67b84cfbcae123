"""`mtlfast.methods` and `mtlfast.weightings`: every method by name, ready for a training step."""

import pytest
import torch
from torch import nn

import mtlfast
from mtlfast import aggregation, weighting
from mtlfast.aggregation import PCGrad, Reads
from mtlfast.weighting import LossWeighting

TASKS = [1, 2, 3, 5]
# Not for every number of tasks, or not for one batch.
LIMITED = {"Krum": [3, 5], "CrossNorm": [1, 2], "MoDo": [], "SDMGrad": []}

kinds = [kind for family in aggregation.FAMILIES.values() for kind in family]
weighting_kinds = [kind for family in weighting.FAMILIES.values() for kind in family]


def train(num_tasks: int, aggregator: aggregation.Aggregator, weighting: LossWeighting | None = None) -> None:
    """Two steps; every gradient must be finite, the trunk's not zero."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(num_tasks))
    learned = [] if weighting is None else list(weighting.parameters())
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters(), *learned], lr=0.01)
    for _ in range(2):
        features = trunk(torch.randn(16, 6))
        optimizer.zero_grad()
        losses = [(head(features) - k).square().mean() for k, head in enumerate(heads)]
        mtlfast.backward(losses, aggregator, shared=trunk, weighting=weighting)
        assert all(p.grad.isfinite().all() for p in [*trunk.parameters(), *learned])
        assert all(p.grad is None or p.grad.isfinite().all() for p in heads.parameters())
        assert any(p.grad.any() for p in trunk.parameters())
        optimizer.step()


@pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.__name__)
def test_every_aggregator_drives_a_step_or_is_left_out_for_a_reason(kind):
    for num_tasks in TASKS:
        methods = mtlfast.methods(num_tasks)
        if num_tasks not in LIMITED.get(kind.__name__, TASKS):
            assert kind.__name__ not in methods
            continue
        aggregator = methods[kind.__name__]()
        assert type(aggregator) is kind
        train(num_tasks, aggregator)


@pytest.mark.parametrize("kind", weighting_kinds, ids=lambda kind: kind.__name__)
def test_every_weighting_drives_a_step(kind):
    for num_tasks in TASKS:
        made = mtlfast.weightings(num_tasks)[kind.__name__]()
        assert type(made) is kind
        assert made.num_tasks in (num_tasks, None)
        train(num_tasks, PCGrad(), made)


def test_they_come_in_the_order_of_the_table_and_new_at_each_call():
    methods, weightings = mtlfast.methods(4), mtlfast.weightings(4)
    assert list(methods) == [kind.__name__ for kind in kinds if 5 in LIMITED.get(kind.__name__, TASKS)]
    assert list(weightings) == [kind.__name__ for kind in weighting_kinds]
    assert methods["PCGrad"]() is not methods["PCGrad"]()
    assert weightings["UW"]() is not weightings["UW"]()


def test_a_method_of_two_batches_is_known_by_what_it_reads():
    assert {kind.__name__ for kind in kinds if kind.for_tasks(3).reads is Reads.CROSS_GRAM} == {"MoDo", "SDMGrad"}


@pytest.mark.parametrize("call", [mtlfast.methods, mtlfast.weightings])
@pytest.mark.parametrize("number", [0, -1, 2.5, "3", True])
def test_a_number_of_tasks_that_is_none_is_refused(call, number):
    with pytest.raises(ValueError) as raised:
        call(number)
    assert str(raised.value) == f"{call.__name__}: num_tasks is {number!r}, expected an integer of at least 1"
