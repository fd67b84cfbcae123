"""Training beside other threads and processes: two models in two threads, loaders with workers, forked children."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import GradVac, NashMTL, PCGrad, UPGrad
from mtlfast.weighting import DWA, UW

WAYS = ["stored", "closures", "accumulated"]


class Samples(Dataset):
    """Samples that a worker computes with native ops."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Tensor:
        matrix = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(i))
        return ops.gram(TaskGradients.from_matrix(matrix)).float()[0].repeat(8) / 20_000


def train(seed: int, way: str, aggregator, weighting=None, batches=None, started=None) -> Tensor:
    """All parameters after a few steps. No random number comes from the global generator."""
    random = torch.Generator().manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(24, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    heads = nn.ModuleList(nn.Linear(128, 1) for _ in range(3))
    parameters = [*trunk.parameters(), *heads.parameters()]
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=random) / p.shape[-1] ** 0.5)
    accumulator = mtlfast.TaskGradientAccumulator(trunk)
    optimizer = torch.optim.Adam([*parameters, *([] if weighting is None else weighting.parameters())], 0.01)
    if started is not None:
        started.wait()
    for x in torch.randn(6, 16, 24, generator=random) if batches is None else batches:
        optimizer.zero_grad()
        if way == "stored":
            features = trunk(x)
            losses = [(heads[k](features) - k).square().mean() for k in range(3)]
        else:
            losses = [lambda k=k, x=x: (heads[k](trunk(x)) - k).square().mean() for k in range(3)]
        if way == "accumulated":
            accumulator.add(losses)
            accumulator.add(losses)
            mtlfast.backward(accumulator, aggregator, weighting=weighting)
        else:
            mtlfast.backward(losses, aggregator, shared=trunk, weighting=weighting)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.fixture
def several_threads():
    """Torch works on two threads, as it does outside of the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("way", "other"), [("stored", "stored"), ("closures", "accumulated"), ("accumulated", "stored")]
)
def test_two_models_in_two_threads(way, other, several_threads):
    def runs():
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return [
            (1, way, GradVac(generator=generators[0]), UW(3)),
            (2, other, PCGrad(generator=generators[1]), DWA(3, window=2)),
        ]

    wanted = [train(*run) for run in runs()]
    started = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(train, *run, started=started) for run in runs()]
    assert all(torch.equal(future.result(), alone) for future, alone in zip(futures, wanted, strict=True))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_data_loader_with_workers(context, several_threads):
    wanted = train(0, "stored", UPGrad(), batches=DataLoader(Samples(), batch_size=8))  # the ops have threads now
    loader = DataLoader(Samples(), batch_size=8, num_workers=2, multiprocessing_context=context, timeout=120)
    assert torch.equal(train(0, "stored", UPGrad(), batches=loader), wanted)


def test_loaders_of_both_kinds_at_the_same_time(several_threads):
    loaders = [
        DataLoader(Samples(), batch_size=8, num_workers=1, multiprocessing_context=context, timeout=120)
        for context in ("fork", "spawn")
    ]
    both = [x for pair in zip(*loaders, strict=True) for x in pair]
    assert all(torch.equal(a, b) for a, b in zip(both[::2], both[1::2], strict=True))
    assert train(0, "stored", NashMTL(), batches=both).isfinite().all()


@pytest.mark.native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", WAYS)
def test_a_step_in_a_forked_child(way, tmp_path):
    program = Path(__file__).with_name("forked.py")
    call = [sys.executable, str(program), way, str(tmp_path / "child")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
