"""DistributedDataParallel in all its modes: steps of mtlfast and of DDP give the gradients of the whole batch."""

from functools import partial

import pytest
import torch
from collectives import Collectives
from ranked import on_ranks
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import mtlfast
from mtlfast.aggregation import NashMTL, Sum, UPGrad

RANKS, ROWS, TASKS = 3, 4, 3


class Net(nn.Module):
    def __init__(self, with_unused):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(TASKS))
        self.unused = nn.Linear(2, 2) if with_unused else None

    def forward(self, x):
        features = self.trunk(x)
        return [head(features).squeeze(-1) for head in self.heads]


def model(with_unused=True):
    torch.manual_seed(0)
    return Net(with_unused).double()


def batch(step, first=0, ranks=RANKS):
    x, y = torch.randn(2, RANKS * ROWS, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    own = slice(first * ROWS, (first + ranks) * ROWS)
    return x[own], y[own]


def losses_of(net, x, y):
    return [(output - y[:, k]).square().mean() for k, output in enumerate(net(x))]


def gradients(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


WITH_UNUSED = {"find_unused_parameters": True}
# Arguments of DDP, what `shared` is, and what `process_group` is.
CASES = {
    "plain": ({}, "trunk", "module"),
    "find_unused_parameters": (WITH_UNUSED, "trunk", "module"),
    "static_graph": ({"static_graph": True}, "trunk", "module"),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True, **WITH_UNUSED}, "trunk", "module"),
    "all of them": ({"gradient_as_bucket_view": True, "static_graph": True}, "trunk", "module"),
    "no_sync": (WITH_UNUSED, "trunk", "module"),
    "a process group": (WITH_UNUSED, "trunk", "group"),
    "found parameters": ({}, "found", "module"),
    "found parameters, a process group": ({}, "found", "group"),
    "the module as shared": (WITH_UNUSED, "module", None),
}


def arguments(ddp, shared, group):
    trunk = None if shared == "found" else ddp if shared == "module" else ddp.module.trunk
    given = None if group is None else ddp if group == "module" else ddp.process_group
    return {"shared": trunk, "process_group": given}


def run(rank, ranks, name):
    """The gradients after two mtlfast steps that add up, after a plain backward pass of DDP, and one more step."""
    options, shared, group = CASES[name]
    net = model(bool(options))
    ddp = DistributedDataParallel(net, **options)
    step = partial(mtlfast.backward, **arguments(ddp, shared, group))
    found = []
    with Collectives() as seen:
        for number in (0, 1):
            if name == "no_sync":
                with ddp.no_sync():
                    losses = losses_of(ddp, *batch(number, rank, 1))
                    step(losses, UPGrad())
            else:
                step(losses_of(ddp, *batch(number, rank, 1)), UPGrad())
    found.append(gradients(net))
    sizes = sum(p.numel() for p in net.trunk.parameters()), sum(p.numel() for p in net.heads.parameters())
    big = seen.elements("all-reduce", 30) + seen.elements("reduce-scatter", 30)
    net.zero_grad()
    for number in (2, 3):
        sum(losses_of(ddp, *batch(number, rank, 1))).backward()
    found.append(gradients(net))
    step(losses_of(ddp, *batch(4, rank, 1)), UPGrad())
    found.append(gradients(net))
    return found, sizes, big


def sub_group(rank):
    """A step of ranks 1 and 2 alone, and one of rank 0, which has none of it."""
    group = distributed.new_group([1, 2])
    net, found = model(), []
    if rank > 0:
        ddp = DistributedDataParallel(net, process_group=group, find_unused_parameters=True)
        method = NashMTL()
        for given in (ddp, group):
            step = mtlfast.backward(
                losses_of(ddp, *batch(5, rank, 1)), method, shared=net.trunk, process_group=given, diagnostics=True
            )
            found.append((gradients(net), step.weights, step.gram, method.state_dict()))
    else:
        with pytest.raises(ValueError, match="this rank is not in process_group, expected a group that it belongs to"):
            mtlfast.backward(losses_of(net, *batch(5)), Sum(), shared=net.trunk, process_group=group)
    return found


def program(rank, ranks):
    return {**{name: run(rank, ranks, name) for name in CASES}, "sub-group": sub_group(rank)}


@pytest.fixture(scope="module")
def results():
    return on_ranks(RANKS, program)


def check(found, expected):
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None) or not (got if wanted is None else wanted).any()
        if got is not None and wanted is not None:
            assert torch.allclose(got, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_step_gives_the_gradients_of_the_whole_batch(results, name):
    options, shared, _ = CASES[name]
    net = model(bool(options))
    trunk = None if shared == "found" else net if shared == "module" else net.trunk
    step = partial(mtlfast.backward, shared=trunk)
    expected = []
    for number in (0, 1):
        step(losses_of(net, *batch(number)), UPGrad())
    expected.append(gradients(net))
    net.zero_grad()
    for number in (2, 3):
        sum(losses_of(net, *batch(number))).backward()
    expected.append(gradients(net))
    step(losses_of(net, *batch(4)), UPGrad())
    expected.append(gradients(net))
    for found, (trunk_size, head_size), big in (of_rank[name] for of_rank in results):
        for got, wanted in zip(found, expected, strict=True):
            check(got, wanted)
        heads, trunks = [n for n in big if n <= head_size], [n for n in big if n > head_size]
        whole = trunk_size + head_size if shared == "module" else trunk_size
        assert len(trunks) == 2 * TASKS
        assert all(whole <= n < whole + 40 for n in trunks)  # once for each task, and nothing by DDP itself
        assert heads == []  # too small to count


def test_a_group_that_is_not_all_ranks(results):
    net, method = model(), NashMTL()
    nobody, *both = (of_rank["sub-group"] for of_rank in results)
    assert nobody == []
    for call in range(2):
        step = mtlfast.backward(losses_of(net, *batch(5, 1, 2)), method, shared=net.trunk, diagnostics=True)
        for found, weights, gram, state in (of_rank[call] for of_rank in both):
            check(found, gradients(net))
            assert torch.allclose(weights, step.weights, rtol=0, atol=1e-9)
            assert torch.allclose(gram, step.gram, rtol=0, atol=1e-9)
            assert torch.equal(state["state"], both[0][call][3]["state"])
