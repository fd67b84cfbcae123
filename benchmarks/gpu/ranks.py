"""A training step on two ranks that share one GPU, by gloo: NCCL takes one rank a GPU."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.multiprocessing as mp
from timed import Row
from torch import distributed, nn
from workloads import Setting

import mtlfast
from mtlfast.aggregation import PCGrad

RANKS = 2


def gradient(x: torch.Tensor, allow_local: bool) -> torch.Tensor:
    """The surgery's direction on one rank's batch, for the same parameters everywhere."""
    torch.manual_seed(0)
    trunk = nn.Linear(x.shape[1], x.shape[1]).to(x.device)
    heads = [nn.Linear(x.shape[1], 1).to(x.device) for _ in range(3)]
    features = trunk(x).tanh()
    losses = [head(features).mean() for head in heads]
    mtlfast.backward(losses, PCGrad(order="fixed"), shared=trunk, allow_local=allow_local)
    assert trunk.weight.grad is not None
    return trunk.weight.grad


def batch(rank: int, setting: Setting) -> torch.Tensor:
    """What the rank sees."""
    return torch.randn(16, setting.width, generator=torch.Generator().manual_seed(rank)).to(setting.device)


def worker(rank: int, setting: Setting, folder: str) -> None:
    """One rank: is refused, then averages its own surgery's gradient with the other's."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    refused = ""
    try:
        gradient(batch(rank, setting), allow_local=False)
    except RuntimeError as error:
        refused = str(error)
    average = gradient(batch(rank, setting), allow_local=True)
    distributed.all_reduce(average)
    torch.save((refused, (average / RANKS).cpu()), Path(folder) / f"rank{rank}")
    distributed.destroy_process_group()


def ranks(setting: Setting) -> Iterator[Row]:
    """Without allow_local both ranks refuse; with it the average is that of the ranks' own surgeries, computed here."""
    want = torch.stack([gradient(batch(rank, setting), allow_local=False).cpu() for rank in range(RANKS)]).mean(0)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(setting, folder), nprocs=RANKS)
        for rank in range(RANKS):
            refused, average = torch.load(Path(folder) / f"rank{rank}")
            off = float((average - want).abs().max() / want.abs().max())
            yield {"rank": rank, "refused without allow_local": refused, "average is off by": off}
            if not (refused.startswith("backward: 2 ranks are initialised") and off < 1e-5):
                raise AssertionError(f"rank {rank}: off by {off}, refused: {refused!r}")
