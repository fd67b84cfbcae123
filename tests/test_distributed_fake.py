"""The collectives of a step on many ranks, which torch's fake process group takes without other processes.

Small values are exchanged on the parameters' device, as in groups that have NCCL alone.
"""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from collectives import Collective, Collectives
from peaks import peak_bytes
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import mtlfast
from mtlfast.aggregation import MoCo, PCGrad, UPGrad
from mtlfast.distributed import _scattered
from mtlfast.distributed._buckets import buckets_of
from mtlfast.distributed._ranks import Ranks


@contextmanager
def fake_ranks(size, rank):
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with mock.patch.object(Ranks, "host_device", lambda ranks, device: device):
            yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


def parameters():
    """Of two dtypes and several layouts, without elements, with fewer than ranks, and not divisible by their number."""
    torch.manual_seed(0)
    return [
        nn.Parameter(torch.randn(5, 3)),
        nn.Parameter(torch.randn(0, 4)),
        nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(7, 9, dtype=torch.float64).mT.contiguous().mT),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(1030)),
    ]


def padded(counts, size):
    return sum(-(-count // size) for count in counts)


@pytest.mark.parametrize(("size", "rank"), [(8, 3), (8, 7), (512, 0), (512, 511)])
def test_pieces_of_a_step(size, rank):
    shared, head = parameters(), nn.Parameter(torch.randn(3))
    losses = [sum((p.double() * (k + 1)).square().sum() for p in shared) * head[k] for k in range(3)]
    with fake_ranks(size, rank) as group, Collectives() as step:
        mtlfast.backward(losses, UPGrad(), shared=shared, process_group=group)
    buckets = [padded([15, 0, 120], size), padded([63], size), padded([1, 1030], size)]
    expected = [
        *(Collective("all-gather", n) for n in (9, 3)),  # the arguments, and which tasks are present
        Collective("all-reduce", 3),  # the losses
        Collective("all-gather", 6),  # the settings
        *[Collective("reduce-scatter", size * n) for n in buckets] * 3,
        Collective("all-gather", 3 * len(shared)),  # which parameters the tasks reach
        Collective("all-reduce", 9),  # the Gram matrix
        *(Collective("all-gather", n) for n in (1, 1)),  # the heads: which they are, and whether they have gradients
        Collective("all-reduce", 3),  # their gradients
        *(Collective("all-gather", n) for n in buckets),  # the direction
    ]
    assert step.seen == expected
    for parameter in (*shared, head):
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("method", [PCGrad, MoCo])
@pytest.mark.parametrize(("size", "rank"), [(8, 5), (512, 300)])
def test_methods_work_on_empty_pieces(method, size, rank):
    shared = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(0, 2))]
    losses = [sum((p * (k - 1)).sin().sum() for p in shared) for k in range(3)]
    with fake_ranks(size, rank) as group:
        step = mtlfast.backward(losses, method(), shared=shared, process_group=group)
    assert step.gram is None or step.gram.shape == (3, 3)
    assert [p.grad.shape for p in shared] == [p.shape for p in shared]


def test_a_piece_is_that_of_the_mean_gradient():
    # The fake group's sums are what this rank put in: a fraction 1 / N of its gradients, and its piece of them.
    shared = [nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(5))]
    with fake_ranks(4, 1) as group:
        step = mtlfast.backward(
            [16 * shared[0].sum() + 8 * shared[1].sum()], UPGrad(), shared=shared, process_group=group, diagnostics=True
        )
    assert step.losses == (16 * shared[0].sum() + 8 * shared[1].sum()) / 4
    assert step.gram.tolist() == [[4 * 4.0**2 + 2 * 2.0**2]]
    assert shared[0].grad.tolist() == [4.0] * 16  # the fake group repeats this rank's piece
    assert shared[1].grad.tolist() == [2.0] * 5


@pytest.mark.parametrize("argument", ["groups", "storage_dtype"])
def test_surgery_at_features_refuses_what_it_refuses_in_a_single_process(argument):
    trunk, given = nn.Linear(3, 2), {"groups": "tensor", "storage_dtype": torch.float32}[argument]
    features = trunk(torch.randn(4, 3))
    with fake_ranks(4, 0) as group, pytest.raises(ValueError, match=f"got {argument}= beside at"):
        mtlfast.backward(
            list(features.square().mean(dim=0)), UPGrad(), at=features, process_group=group, **{argument: given}
        )


@pytest.mark.parametrize("size", [2, 4])
def test_peak_memory(size):
    bucket, tasks, number = 2**20, 4, 16
    shared = [nn.Parameter(torch.randn(bucket // 4)) for _ in range(number)]  # a bucket each
    factors = torch.randn(bucket // 4)
    losses = [sum(((k + 1) * factors * p).sum() for p in shared) for k in range(tasks)]
    in_buckets = mock.patch.object(_scattered, "buckets_of", partial(buckets_of, most=bucket))
    with fake_ranks(size, 1) as group, in_buckets:
        peak = peak_bytes(lambda: mtlfast.backward(losses, UPGrad(), shared=shared, process_group=group))
    P = number * bucket
    assert P < peak < tasks * P / size + P + 2 * bucket + 2**16  # pieces, one task's gradients, two buckets in flight
