"""Several ranks: ranks without a task, loss weights of 0, heads elsewhere, and what would go wrong silently."""

from functools import cache

import pytest
from ranked import on_ranks
from ranked_found import differences, refusals

STEPS = [
    "absent closures",
    "absent closures, weighted",
    "absent, weighted by norms",
    "loss weight of 0 under FSDP2",
    "loss weight of 0 under FSDP2, state",
    "named while gathered",
    "heads outside",
    "heads in modules of their own",
    "beside another sharded model",
    "input below features",
]
WHOLE = "ByLength: needs the task gradients as a whole, but each rank holds a part of them"
UNREDUCED = "backward: a sharded module does not reduce its gradients"
REFUSED = {
    "whole rows under FSDP2": WHOLE,
    "whole rows at features": WHOLE,
    "diagnostics": "backward: rank 1 has another diagnostics than rank 0 in step",
    "loss scale": "backward: rank 1 has another loss_scale than rank 0 in step",
    "closures": "backward: some ranks have closures and others have losses in step",
    "frozen on one rank": "backward: rank 1 has another set of other parameters that require grad",
    "no reduction of a part": UNREDUCED,
    "no all-reduce": UNREDUCED,
    "an earlier pass": "backward: a sharded module holds gradients of an earlier pass that are not reduced yet",
    "whole parameter below features": "backward: a parameter of shape [7] below at= is whole on every rank",
}


@cache
def measured():
    return on_ranks(2, differences)


@cache
def refused():
    return on_ranks(2, refusals)


@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    for of_rank in measured():
        assert of_rank[name] < 1e-9


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    for of_rank in refused():
        assert of_rank[name].startswith(REFUSED[name])
        assert "written" not in of_rank[name]


def test_none_is_left_out():
    assert set(measured()[0]) == set(STEPS)
    assert set(refused()[0]) == set(REFUSED)
