"""What a step sends and what it holds: collectives counted and memory measured on the ranks."""

from functools import partial
from unittest import mock

import pytest
import torch
from collectives import Collectives
from peaks import peak_bytes
from ranked import on_ranks
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import mtlfast
from mtlfast.aggregation import MoCo, PCGrad, TrimmedMean, UPGrad
from mtlfast.distributed import _choose, _scattered
from mtlfast.distributed._all_reduced import AllReduced
from mtlfast.distributed._buckets import buckets_of

RANKS, TASKS = 4, 3
SMALL = 60  # elements: more than any collective of a step has that does not grow with P, but for random states
METHODS = {"UPGrad": UPGrad, "PCGrad": PCGrad, "MoCo": MoCo, "TrimmedMean": partial(TrimmedMean, 1)}
# The small collectives of a step: the arguments, the present tasks, the losses, the settings, the reached parameters,
# the Gram matrix, and of parameters beside the shared ones which there are besides the module's, and which have
# gradients. Random numbers: one state of a generator.
SMALL_ONES = 8
BUCKET, PARAMETERS, MEMORY_TASKS = 2**20, 16, 4  # bytes of a bucket and of a parameter
ELEMENTS = BUCKET // 4


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(11, width), nn.Tanh(), nn.Linear(width, 13))
        self.heads = nn.ModuleList(nn.Linear(13, 7) for _ in range(TASKS))

    def forward(self, x):
        features = self.trunk(x)
        return [head(features).square().mean() for head in self.heads]


def collectives(rank, width, mode, name):
    torch.manual_seed(0)
    net = Net(width)
    if mode.startswith("FSDP2"):
        from torch.distributed.fsdp import fully_shard

        fully_shard(net.trunk)
        fully_shard(net)
    else:
        net = DistributedDataParallel(net)
    x = torch.randn(5, 11)
    with (
        Collectives() as step,
        mock.patch.object(_choose, "Scattered", AllReduced if mode == "whole" else _scattered.Scattered),
    ):
        losses = net(x)
        if mode == "FSDP2 without surgery":
            for k, loss in enumerate(losses):
                loss.backward(retain_graph=k + 1 < TASKS)
        elif mode == "FSDP2":
            mtlfast.backward(losses, METHODS[name](), shared=net.trunk)
        else:
            mtlfast.backward(losses, METHODS[name](), shared=net.module.trunk, process_group=net)
    return step.seen


def peak(ranks):
    """The peak of a step of four tasks beside its `.grad`, in bytes."""
    shared = [nn.Parameter(torch.randn(ELEMENTS)) for _ in range(PARAMETERS)]
    factors = torch.randn(ELEMENTS)
    losses = [sum(((k + 1) * factors * p).sum() for p in shared) for k in range(MEMORY_TASKS)]
    with mock.patch.object(_scattered, "buckets_of", partial(buckets_of, most=BUCKET)):
        return peak_bytes(lambda: mtlfast.backward(losses, UPGrad(), shared=shared, process_group=ranks))


def measure(rank, ranks):
    seen = {(width, mode, "UPGrad"): collectives(rank, width, mode, "UPGrad") for width in (16, 300) for mode in MODES}
    seen |= {(16, "pieces", name): collectives(rank, 16, "pieces", name) for name in METHODS}
    two = distributed.new_group([0, 1])
    peaks = {2: peak(two) if rank < 2 else None, 4: peak(distributed.group.WORLD)}
    return seen, peaks


MODES = ("pieces", "whole", "FSDP2", "FSDP2 without surgery")


@pytest.fixture(scope="module")
def traffic():
    return on_ranks(RANKS, measure)


def seen(traffic, width, mode, name="UPGrad"):
    of_ranks = [of_rank[(width, mode, name)] for of_rank, _ in traffic]
    if mode[:5] != "FSDP2":
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
    found = Collectives()
    found.seen = of_ranks[0]
    return found


def sizes(width):
    net = Net(width)
    return [[p.numel() for p in part.parameters()] for part in (net.trunk, net.heads)]


@pytest.mark.parametrize("width", [16, 300])
def test_pieces_send_one_update_more_than_the_tasks(traffic, width):
    trunk, heads = sizes(width)
    piece = sum(-(-count // RANKS) for count in trunk)
    step = seen(traffic, width, "pieces")
    assert step.elements("reduce-scatter") == [RANKS * piece] * TASKS
    assert step.elements("all-gather", SMALL) == [piece]
    assert step.elements("all-reduce", SMALL) == [sum(heads)]
    assert step.small(SMALL) == SMALL_ONES
    sent = (RANKS - 1) / RANKS * (sum(step.elements("reduce-scatter")) + RANKS * piece)  # by a ring
    exact = (TASKS + 1) * sum(trunk) * (RANKS - 1) / RANKS
    assert exact <= sent < exact + (TASKS + 1) * len(trunk) * RANKS


@pytest.mark.parametrize("width", [16, 300])
def test_whole_gradients_take_one_all_reduce_for_each_task(traffic, width):
    trunk, heads = sizes(width)
    step = seen(traffic, width, "whole")
    assert step.elements("all-reduce", SMALL) == [sum(trunk)] * TASKS + [sum(heads)]
    assert step.elements("reduce-scatter") == step.elements("all-gather", SMALL) == []
    assert step.small(SMALL) == SMALL_ONES - 1  # each rank computes the whole Gram matrix


@pytest.mark.parametrize("width", [16, 300])
def test_fully_sharded_modules_send_nothing_else_that_grows(traffic, width):
    step, plain = seen(traffic, width, "FSDP2"), seen(traffic, width, "FSDP2 without surgery")
    for kind in ("reduce-scatter", "all-gather", "all-reduce"):
        assert step.elements(kind, SMALL) == plain.elements(kind, SMALL)
    assert step.small(SMALL) - plain.small(SMALL) == SMALL_ONES - 1  # FSDP2 reduces the heads' gradients
    assert step.elements("all-reduce") == [TASKS, TASKS**2]


@pytest.mark.parametrize(
    ("name", "small"), [("PCGrad", SMALL_ONES), ("MoCo", SMALL_ONES), ("TrimmedMean", SMALL_ONES - 1)]
)
def test_small_collectives_of_other_methods(traffic, name, small):
    step = seen(traffic, 16, "pieces", name)
    assert step.elements("reduce-scatter") == seen(traffic, 16, "pieces").elements("reduce-scatter")
    assert step.elements("broadcast") == ([torch.get_rng_state().numel()] if name == "PCGrad" else [])
    assert step.small(SMALL) == small


@pytest.mark.parametrize("ranks", [2, 4])
def test_peak_memory(traffic, ranks, record_property):
    P = PARAMETERS * BUCKET
    bound = MEMORY_TASKS * P / ranks + P + 12 * BUCKET  # two in flight; the others are gloo's own copies
    for _, peaks in traffic[:ranks]:
        record_property("MiB", peaks[ranks] / 2**20)
        assert P < peaks[ranks] < bound
