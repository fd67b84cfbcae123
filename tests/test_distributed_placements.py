"""FSDP2, HSDP, tensor parallel and both: G counts every element once, and the update is that of a single process."""

from functools import cache

import pytest
from ranked import on_ranks
from ranked_placements import METHODS, placements

PLACEMENTS = [
    *(f"FSDP2, {name}, reshard {reshard}" for name in METHODS for reshard in (True, False)),
    *(f"HSDP, {name}" for name in METHODS),
    *(f"{kind}, {name}" for kind in ("tensor parallel", "both") for name in ("PCGrad", "UPGrad")),
    "groups",
    "mixed precision",
    "whole beside sharded",
]


@cache
def measured() -> list[dict[str, float]]:
    return on_ranks(4, placements)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_steps_on_placements(name):
    for of_rank in measured():
        assert of_rank[name] < 1e-9


def test_no_placement_is_left_out():
    assert set(measured()[0]) == set(PLACEMENTS)
