"""Several ranks take the steps that a single process takes on the batches of all of them."""

from functools import cache

import pytest
import torch
from ranked import on_ranks
from ranked_steps import CASES, alone, on_rank
from torch import Tensor

SHARDED = [name for name, case in CASES.items() if not case.absent and case.form not in ("accumulated", "second", "at")]


@cache
def trained(mode: str, ranks: int) -> list[dict[str, Tensor]]:
    return on_ranks(ranks, on_rank, mode, SHARDED if mode == "FSDP2" else list(CASES))


def check(mode: str, ranks: int, name: str) -> None:
    expected = alone(name, ranks)
    for of_rank in trained(mode, ranks):
        exact = CASES[name].dtype == torch.float64 and "storage_dtype" not in CASES[name].options
        assert torch.allclose(of_rank[name], expected, rtol=0, atol=1e-9 if exact else 1e-5)
        assert torch.equal(of_rank[name], trained(mode, ranks)[0][name])


@pytest.mark.parametrize("name", CASES)
def test_pieces(name):
    check("pieces", 2, name)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_pieces_of_three_ranks(name):
    check("pieces", 3, name)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_whole(name):
    check("whole", 2, name)


@pytest.mark.parametrize("name", SHARDED)
def test_fully_sharded(name):
    check("FSDP2", 2, name)
