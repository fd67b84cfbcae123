"""What ranks must agree about: an error of one rank, or a difference between two, is an error on all of them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
from ranked import on_ranks
from ranked_arguments import Step, accumulated, closures, named, without

from mtlfast.aggregation import CAGrad, FairGrad, NashMTL, PCGrad, Sum, UPGrad
from mtlfast.weighting import DWA

RANKS = 2
PATIENCE = timedelta(seconds=20)  # only a rank that waits for another in vain takes so long


class Case(NamedTuple):
    """A step that is refused.

    Attributes:
        options: the arguments of `Step` by rank.
        errors: the beginning of the error of each rank.
    """

    options: Callable[[int], dict[str, Any]]
    errors: list[str]


def another(what):
    return [f"backward: rank 1 has another {what} than rank 0 in step {{step}}, expected the same on all"] * 2


def of_rank_1(error):
    return ["backward: rank 1 has an error in step {step}, expected all ranks to take it", error]


def sparse(name):
    return [f"backward: the gradient of {name} is sparse, expected dense ones over several ranks; make its table"] * 2


CASES = {
    "number of losses": Case(lambda rank: {"losses": lambda x: x[rank:]}, another("number of losses")),
    "no losses": Case(lambda rank: {"losses": (list, lambda x: [])[rank]}, another("number of losses")),
    "names": Case(
        lambda rank: {"losses": (named("a", "b", "c"), named("a", "c", "b"))[rank]}, another("names of the losses")
    ),
    "names on one rank": Case(
        lambda rank: {"losses": (list, named("a", "b", "c"))[rank]}, another("names of the losses")
    ),
    "shared parameters": Case(lambda rank: {"some_shared": rank == 1}, another("shared parameters")),
    "shared parameters of another dtype": Case(
        lambda rank: {"dtype": (torch.float64, torch.float32)[rank]}, another("shared parameters")
    ),
    "aggregator": Case(lambda rank: {"method": (UPGrad, PCGrad)[rank]()}, another("aggregator or weighting")),
    "setting": Case(lambda rank: {"method": CAGrad(c=(0.4, 0.5)[rank])}, another("aggregator or weighting")),
    "weighting": Case(lambda rank: {"weighting": (None, DWA(3))[rank]}, another("aggregator or weighting")),
    "loss scale": Case(lambda rank: {"loss_scale": 1.0 + rank}, another("loss_scale")),
    "precision": Case(lambda rank: {"precision": ("exact", "fast")[rank]}, another("precision")),
    "groups": Case(lambda rank: {"groups": ("tensor", None)[rank]}, another("groups")),
    "diagnostics": Case(lambda rank: {"method": Sum(), "diagnostics": rank == 1}, another("diagnostics")),
    "storage dtype": Case(lambda rank: {"storage_dtype": (None, torch.float32)[rank]}, another("storage_dtype")),
    "closures on one rank": Case(
        lambda rank: {"losses": (list, closures)[rank]},
        ["backward: some ranks have closures and others have losses in step {step}, expected one form"] * 2,
    ),
    "a loss that is no scalar": Case(
        lambda rank: {"losses": (list, lambda x: [x[0].repeat(2), *x[1:]])[rank]},
        of_rank_1("backward: loss 0 has shape [2], expected a scalar"),
    ),
    "no aggregator": Case(
        lambda rank: {"method": (UPGrad(), "UPGrad")[rank]}, of_rank_1("backward: aggregator is a str, expected a")
    ),
    "implicit": Case(
        lambda rank: {"jacobian": (None, "implicit")[rank]},
        of_rank_1("backward: jacobian is 'implicit' over several ranks, expected 'stored', because products of"),
    ),
    "mixing": Case(
        lambda rank: {"mixing": torch.eye(3)},
        ["backward: got mixing= over several ranks, expected the losses of tasks"] * 2,
    ),
    "a bad loss scale": Case(
        lambda rank: {"loss_scale": 1.0 - 2 * rank, "method": FairGrad()}, of_rank_1("FairGrad: loss_scale is -1.0")
    ),
    "bad groups": Case(
        lambda rank: {"groups": ("tensor", "tensors")[rank]}, of_rank_1("backward: groups is 'tensors'")
    ),
    "a bad storage dtype": Case(
        lambda rank: {"storage_dtype": (None, torch.int32)[rank]}, of_rank_1("backward: storage_dtype is torch.int32")
    ),
    "an empty accumulator": Case(
        lambda rank: {"losses": lambda x: accumulated(x if rank == 0 else []), "shared": None},
        of_rank_1("backward: the accumulator is empty, expected at least one call of add() before"),
    ),
    "a storage dtype beside an accumulator": Case(
        lambda rank: {"losses": accumulated, "shared": None, "storage_dtype": torch.float32},
        ["backward: got storage_dtype= beside an accumulator"] * 2,
    ),
    "a task absent on one rank": Case(
        lambda rank: {"losses": (list, without(1))[rank]},
        [
            "backward: the ranks have losses of different tasks in step {step}, expected process_group= to be the "
            "DistributedDataParallel module, which knows the heads of tasks that are absent"
        ]
        * 2,
    ),
    "no task anywhere": Case(
        lambda rank: {"losses": without(0, 1, 2), "ddp": True},
        ["backward: got 3 losses, none of them present on any rank, expected at least one"] * 2,
    ),
    "sparse gradients": Case(lambda rank: {"sparse": True}, sparse("shared 0")),
    "sparse gradients on one rank": Case(lambda rank: {"sparse": rank == 1}, sparse("shared 0")),
    "sparse gradients of closures": Case(
        lambda rank: {"sparse": True, "losses": closures, "retain_graph": True}, sparse("shared 0")
    ),
    "sparse gradients beside the shared ones": Case(
        lambda rank: {"sparse_beside": rank == 1, "method": NashMTL()}, sparse("a parameter of shape [6, 5]")
    ),
}


def program(rank, ranks):
    """What each rank sees of a first step that is refused, and whether the next one succeeds."""
    found = {}
    for name, case in CASES.items():
        options = case.options(rank)
        some_shared = options.pop("some_shared", False)
        step = Step(rank, **options)
        if some_shared:
            step.shared.pop()
        for p in step.net.parameters():
            p.grad = torch.ones_like(p)
        found[name] = step.refused()
    after = Step(rank)
    after.run()
    return found, after.gradients()


@pytest.fixture(scope="module")
def refused():
    return on_ranks(RANKS, program, timeout=PATIENCE)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_refuse_the_step(refused, name):
    number = 1 + list(CASES).index(name)
    for (found, _), expected in zip(refused, CASES[name].errors, strict=True):
        error, as_before = found[name]
        assert error is not None
        assert error.startswith(expected.format(step=number))
        assert as_before


def test_a_step_after_a_refused_one_succeeds(refused):
    for a, b in zip(*(gradients for _, gradients in refused), strict=True):
        assert torch.equal(a, b)
