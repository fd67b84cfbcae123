"""With several ranks `backward` refuses, instead of letting replicas drift apart silently."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn

import mtlfast
from mtlfast.aggregation import Sum, UPGrad
from mtlfast.compat.pcgrad import PCGrad


def worker(rank: int, ranks: int, file: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    p = nn.Parameter(torch.ones(3))
    if ranks > 1:
        with pytest.raises(RuntimeError) as raised:
            mtlfast.backward([p.sum()], Sum(), shared=[p])
        assert str(raised.value) == (
            "backward: 2 ranks are initialised, and surgery on each rank's own gradients lets replicas drift apart; "
            "expected process_group=, a DistributedDataParallel module as shared=, or allow_local=True"
        )
        assert p.grad is None
        with pytest.raises(RuntimeError, match="PCGrad: 2 ranks are initialised, and surgery on each rank's own"):
            PCGrad(torch.optim.SGD([p], lr=0.1)).pc_backward([p.sum()])
        PCGrad(torch.optim.SGD([p], lr=0.1), allow_local=True).pc_backward([p.sum()])
        p.grad = None
    mtlfast.backward([p.sum()], Sum(), shared=[p], allow_local=ranks > 1)
    assert p.grad.tolist() == [1.0] * 3
    distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_alone_must_be_asked_for(ranks, tmp_path):
    mp.spawn(worker, args=(ranks, str(tmp_path / "rendezvous")), nprocs=ranks)


def sharded(rank: int, ranks: int, file: str) -> None:
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    for which in ("whole trunk", "first layer", "last layer", "head"):
        trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
        fully_shard({"whole trunk": trunk, "first layer": trunk[0], "last layer": trunk[2], "head": heads[0]}[which])
        before = list(trunk.parameters())  # DTensors, as an optimizer was given them
        features = trunk(torch.randn(5, 4))
        losses = [head(features).square().mean() for head in heads]
        for shared in (before, list(trunk.parameters())):  # gathered ones, after the forward pass
            with pytest.raises(ValueError, match=r"sharded over processes|under fully_shard"):
                mtlfast.backward(losses, Sum(), shared=shared, allow_local=True)
        assert all(p.grad is None for p in [*trunk.parameters(), *heads.parameters()])
    trunk, head = nn.Linear(4, 3), nn.Linear(3, 1)  # beside sharded modules, whole ones train
    mtlfast.backward([head(trunk(torch.ones(2, 4))).mean()], Sum(), shared=trunk)
    assert trunk.weight.grad is not None
    distributed.destroy_process_group()


def test_sharded_parameters_are_refused(tmp_path):
    mp.spawn(sharded, args=(1, str(tmp_path / "rendezvous")), nprocs=1)


def sharded_below(rank: int, ranks: int, file: str) -> None:
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    split = copy.deepcopy(whole)
    fully_shard(split)  # its hooks on the features gather the parameters and reduce their gradients
    heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
    x = torch.randn(5, 4)
    for trunk in (whole, split):
        features = trunk(x)
        mtlfast.backward([head(features).square().mean() for head in heads], UPGrad(), at=features)
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad.full_tensor())
    distributed.destroy_process_group()


def test_a_sharded_trunk_trains_below_features(tmp_path):
    mp.spawn(sharded_below, args=(1, str(tmp_path / "rendezvous")), nprocs=1)
