"""Steps in which several ranks could go wrong silently, each compared on the ranks with a single process's."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from ranked_placements import losses_of, models, whole
from ranked_steps import ROWS, TASKS, batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtlfast
from mtlfast import weighting
from mtlfast.aggregation import Aggregator, MoCo, UPGrad


class ByLength(Aggregator):
    """Weighs tasks by the lengths of their whole gradients, which no part of the elements tells."""

    def aggregate(self, grads: Any, step: Any, out: Any) -> Any:
        lengths = [sum(g.square().sum() for g in row if g is not None) for row in grads.rows]
        return [sum(row[t] / n for row, n in zip(grads.rows, lengths, strict=True)) for t in range(len(out))]


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.trunk[0])
    fully_shard(net)
    return net


def difference(net: nn.Module, alone: nn.Module) -> float:
    """The largest difference of a `.grad`."""
    pairs = [(p.grad, q.grad) for p, q in zip(net.parameters(), alone.parameters(), strict=True)]
    if any((p is None) != (q is None) for p, q in pairs):
        return float("inf")
    return max((whole(p) - q).abs().max().item() for p, q in pairs if p is not None)


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


def own_rows(rank: int) -> slice:
    return slice(rank * ROWS, (rank + 1) * ROWS)


def absent(rank: int, ranks: int, closures: bool, weigh: Callable[[], Any]) -> float:
    """A rank without any task takes part, whether the losses are known before the passes or not."""
    net, alone = models()
    ddp, weighs = DistributedDataParallel(net), (weigh(), weigh())
    for number in range(3):
        x, y = batch(number, ranks, torch.float64)
        own = own_rows(rank)

        def loss(k: int, x: Tensor = x[own], y: Tensor = y[own]) -> Tensor:
            return losses_of(ddp(x), y)[k]

        losses: Sequence[Any] = [None] * TASKS
        if number != 1 or rank == 0:
            losses = [partial(loss, k) if closures else loss(k) for k in range(TASKS)]
        mtlfast.backward(losses, UPGrad(), shared=net.trunk, process_group=ddp, weighting=weighs[0])
        if number == 1:
            wanted = [loss / ranks for loss in losses_of(alone(x[:ROWS]), y[:ROWS])]
        else:
            wanted = losses_of(alone(x), y)
        mtlfast.backward(wanted, UPGrad(), shared=alone.trunk, weighting=weighs[1], allow_local=True)
    return difference(net, alone)


def weighed_by_zero(rank: int, ranks: int, method: Callable[[], Any]) -> float:
    net, alone = models()
    sharded(net)
    x, y = batch(0, ranks, torch.float64)
    own, options = own_rows(rank), {"weighting": weighting.Constant([1.0, 0.0, 2.0])}
    mtlfast.backward(losses_of(net(x[own]), y[own]), method(), shared=net.trunk, **options)
    mtlfast.backward(losses_of(alone(x), y), method(), shared=alone.trunk, allow_local=True, **options)
    return difference(net, alone)


def named_while_gathered(rank: int, ranks: int) -> float:
    """After a forward pass modules show gathered parameters, also to groups and to layers of a weighting."""
    net, alone = models()
    sharded(net)
    x, y = batch(0, ranks, torch.float64)
    own = own_rows(rank)
    steps = [(net, losses_of(net(x[own]), y[own]), {}), (alone, losses_of(alone(x), y), {"allow_local": True})]
    for model, losses, options in steps:
        trunk = model.trunk
        of_groups = {"first": trunk[0], "rest": [trunk[2], trunk[3]]}
        norms = weighting.GradNorm(TASKS, layers=list(trunk[3].parameters()))
        mtlfast.backward(losses, UPGrad(), shared=trunk, groups=of_groups, weighting=norms, **options)
    return difference(net, alone)


def heads_outside(rank: int, ranks: int, wrap: Callable[[nn.Module], nn.Module]) -> float:
    """Heads beside the module under DistributedDataParallel."""
    net, alone = models()
    trunk, heads = DistributedDataParallel(net.trunk), [wrap(head) for head in net.heads]
    x, y = batch(0, ranks, torch.float64)
    own = own_rows(rank)
    features = trunk(x[own]).tanh()
    losses = losses_of([head(features).squeeze(-1) for head in heads], y[own])
    mtlfast.backward(losses, UPGrad(), shared=trunk)
    mtlfast.backward(losses_of(alone(x), y), UPGrad(), shared=alone.trunk, allow_local=True)
    return difference(net, alone)


def beside_another_sharded_model(rank: int, ranks: int) -> float:
    """Whole parameters that the graph finds, while a sharded model exists."""
    teacher = sharded(models()[0])
    net, alone = models()
    ddp = DistributedDataParallel(net)
    x, y = batch(0, ranks, torch.float64)
    own = own_rows(rank)
    mtlfast.backward(losses_of(ddp(x[own]), y[own]), UPGrad(), process_group=ddp)
    mtlfast.backward(losses_of(alone(x), y), UPGrad(), allow_local=True)
    assert teacher is not None
    return difference(net, alone)


def input_below_features(rank: int, ranks: int) -> float:
    """An input that requires grad is each rank's own."""
    net, alone = models()
    ddp = DistributedDataParallel(net)
    x, y = batch(0, ranks, torch.float64)
    own = own_rows(rank)
    mine, every = x[own].clone().requires_grad_(), x.clone().requires_grad_()
    features, outputs = ddp(mine, at_features=True)
    mtlfast.backward(losses_of(outputs, y[own]), UPGrad(), at=features, process_group=ddp)
    features, outputs = alone(every, at_features=True)
    mtlfast.backward(losses_of(outputs, y), UPGrad(), at=features, allow_local=True)
    of_input = (mine.grad / ranks - every.grad[own]).abs().max().item()
    return max(of_input, difference(net, alone))


def differences(rank: int, ranks: int) -> dict[str, float]:
    """The differences from a single process."""
    none, norms = (lambda: None), (lambda: weighting.GradNorm(TASKS))
    return {
        "absent closures": absent(rank, ranks, True, none),
        "absent closures, weighted": absent(rank, ranks, True, lambda: weighting.DWA(TASKS)),
        "absent, weighted by norms": absent(rank, ranks, False, norms),
        "loss weight of 0 under FSDP2": weighed_by_zero(rank, ranks, UPGrad),
        "loss weight of 0 under FSDP2, state": weighed_by_zero(rank, ranks, MoCo),
        "named while gathered": named_while_gathered(rank, ranks),
        "heads outside": heads_outside(rank, ranks, lambda head: head),
        "heads in modules of their own": heads_outside(rank, ranks, DistributedDataParallel),
        "beside another sharded model": beside_another_sharded_model(rank, ranks),
        "input below features": input_below_features(rank, ranks),
    }


def refusals(rank: int, ranks: int) -> dict[str, str]:
    """The errors, after each of which every `.grad` is what it was."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, y = (of_all[own_rows(rank)] for of_all in batch(0, ranks, torch.float64))
    found = {}

    def step(net: nn.Module, method: Aggregator | None = None, losses: Any = None, **options: Any) -> str:
        losses = losses_of(net(x), y) if losses is None else losses
        shared = None if "at" in options else net.trunk
        before = [p.grad for p in net.parameters()]
        text = message(lambda: mtlfast.backward(losses, method or UPGrad(), shared=shared, **options))
        same = all(p.grad is grad for p, grad in zip(net.parameters(), before, strict=True))
        return text if same else f"{text}, and a .grad was written"

    found["whole rows under FSDP2"] = step(sharded(models()[0]), ByLength())
    net = models()[0]
    ddp = DistributedDataParallel(net)
    features, outputs = ddp(x, at_features=True)
    found["whole rows at features"] = step(net, ByLength(), losses_of(outputs, y), at=features, process_group=ddp)
    found["diagnostics"] = step(net, diagnostics=rank == 0, process_group=ddp)
    found["loss scale"] = step(net, loss_scale=1.0 + rank, process_group=ddp)
    one = losses_of(ddp(x), y)
    found["closures"] = step(net, losses=one if rank else [lambda k=k: one[k] for k in range(TASKS)], process_group=ddp)

    net = models()[0]
    ddp = DistributedDataParallel(net)
    net.heads[0].requires_grad_(rank == 0)
    found["frozen on one rank"] = step(net, process_group=ddp)

    net = sharded(models()[0])
    net.trunk[0].set_requires_gradient_sync(False)
    found["no reduction of a part"] = step(net)
    net = models()[0]
    fully_shard(net, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    net.set_requires_all_reduce(False)
    found["no all-reduce"] = step(net)
    net = sharded(models()[0])
    net.set_requires_gradient_sync(False)
    sum(losses_of(net(x), y)).backward()
    net.set_requires_gradient_sync(True)
    found["an earlier pass"] = step(net)

    net = models()[0]
    fully_shard(net.trunk[3])
    features = net.trunk(x)
    outputs = [head(features.tanh()).squeeze(-1) for head in net.heads]
    found["whole parameter below features"] = step(net, losses=losses_of(outputs, y), at=features)
    return found
