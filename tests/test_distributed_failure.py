"""A rank that dies or does not come: the others raise, and name the collective and the step; no `.grad` changes."""

import copy
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranked import on_ranks
from torch import distributed, nn

import mtlfast
from mtlfast.aggregation import MoCo, NashMTL
from mtlfast.distributed._ranks import Ranks

TIMEOUT = timedelta(seconds=3)
PATIENCE = timedelta(seconds=60)  # a rank that died is noticed at once
# The collectives to which a rank does not come, by a part of their names.
LATE = {
    "loss 1": "the reduction of the gradients of loss 1",
    "Gram": "the sum of the Gram matrices",
    "update": "the exchange of the update",
    "heads": "the comparison of the heads",
}
DIES = {"loss 1": 2, "Gram": 1}  # and the rank that does


def stay_away(what, until):
    """Makes this rank fail as it comes to a collective: it waits, or it dies if there is nothing to wait for."""
    before = Ranks.named

    def named(self, name):
        if what not in name:
            return before(self, name)
        if until is None:
            os._exit(0)
        while not until.exists():
            time.sleep(0.05)
        raise SystemExit

    Ranks.named = named
    return before


def step(group, what, fails, until=None):
    """What rank 0 sees of the second step of its group, in which another rank fails."""
    torch.manual_seed(0)
    trunk, head = nn.Linear(5, 3), nn.Linear(3, 3)
    method = MoCo() if what == "heads" else NashMTL()
    parameters = [*trunk.parameters(), *head.parameters()]

    def losses():
        return list(head(trunk(torch.randn(4, 5)).tanh()).square().mean(dim=0))

    mtlfast.backward(losses(), method, shared=trunk, process_group=group)
    before = [p.grad.clone() for p in parameters]
    state = copy.deepcopy(method.state_dict())
    named = stay_away(what, until) if fails else Ranks.named
    error = None
    try:
        mtlfast.backward(losses(), method, shared=trunk, process_group=group)
    except SystemExit:
        Ranks.named = named
    except RuntimeError as raised:
        error = str(raised)
    same = all(map(torch.equal, before, [p.grad for p in parameters]))
    return error, same, repr(state) == repr(method.state_dict())


def program(rank, ranks, folder):
    """Steps of rank 0 in several groups, in each of which the other rank fails: rank 1 is late, then 2 and 1 die."""
    late = [(what, distributed.new_group([0, 1], timeout=TIMEOUT)) for what in LATE]
    dead = [(what, other, distributed.new_group([0, other], timeout=PATIENCE)) for what, other in DIES.items()]
    found = {}
    for what, group in late if rank < 2 else []:
        until = Path(folder, f"{what} failed")
        found["late", what] = step(group, what, rank == 1, until)
        until.touch()
    for what, other, group in dead:
        if rank in (0, other):
            found["dies", what] = step(group, what, rank == other)
    torch.save(found, f"{folder}/found")
    os._exit(0)  # the barrier of all ranks cannot end any more


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("failures"))
    on_ranks(3, program, folder, collect=False)
    return torch.load(f"{folder}/found")


@pytest.mark.parametrize("what", LATE)
def test_a_rank_that_does_not_come_in_time(failures, what):
    error, same_gradients, same_state = failures["late", what]
    sentence = rf"backward: {LATE[what]} failed in step \d+ on rank 0 of 2, expected all ranks to take part in it \("
    assert re.match(sentence, error)
    assert same_gradients
    assert same_state


@pytest.mark.parametrize("what", DIES)
def test_a_rank_that_dies(failures, what):
    error, same_gradients, same_state = failures["dies", what]
    # The reduction of loss 0 may still be under way when the rank dies.
    names = "|".join((LATE[what], LATE[what].replace("loss 1", "loss 0")))
    sentence = rf"backward: ({names}) failed in step \d+ on rank 0 of 2, expected all ranks to take part in it \("
    assert re.match(sentence, error)
    assert same_gradients
    assert same_state
