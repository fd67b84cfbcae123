"""Several ranks: no silent drift."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import mtlfast
from mtlfast.aggregation import Sum


def worker(rank: int, ranks: int, file: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    p = nn.Parameter(torch.ones(3))
    if ranks > 1:
        with pytest.raises(RuntimeError) as raised:
            mtlfast.backward([p.sum()], Sum(), shared=[p])
        assert str(raised.value) == (
            "backward: 2 ranks are initialised, and surgery on each rank's own gradients lets replicas drift apart; "
            "expected one rank, or allow_local=True"
        )
        assert p.grad is None
    mtlfast.backward([p.sum()], Sum(), shared=[p], allow_local=ranks > 1)
    assert p.grad.tolist() == [1.0] * 3
    distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_alone_must_be_asked_for(ranks, tmp_path):
    mp.spawn(worker, args=(ranks, str(tmp_path / "rendezvous")), nprocs=ranks)
