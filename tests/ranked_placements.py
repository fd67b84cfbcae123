"""Steps on DTensors of several placements, each compared on the ranks with a single process's."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from ranked_steps import ROWS, Net, batch
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import GradDrop, MoCo, PCGrad, UPGrad

METHODS = {
    "PCGrad": lambda: PCGrad(generator=torch.Generator().manual_seed(2)),
    "UPGrad": UPGrad,
    "GradDrop": lambda: GradDrop(generator=torch.Generator().manual_seed(2)),
    "MoCo": MoCo,
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def losses_of(outputs: Any, y: Tensor) -> list[Tensor]:
    return [(output - y[:, k]).square().mean() for k, output in enumerate(outputs)]


def differences(net: nn.Module, alone: nn.Module, name: str, own: slice, ranks: int, groups: Any = None) -> float:
    """The largest difference of a parameter between both models after three steps, and of G in any of them."""
    largest = 0.0
    method, other = METHODS[name](), METHODS[name]()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (net, alone)]
    options = {} if groups is None else {"groups": groups}
    for number in range(3):
        x, y = batch(number, ranks, torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        step = mtlfast.backward(losses_of(net(x[own]), y[own]), method, shared=net.trunk, **options)
        wanted = mtlfast.backward(losses_of(alone(x), y), other, shared=alone.trunk, allow_local=True, **options)
        if step.gram is not None:
            largest = max(largest, (step.gram - wanted.gram).abs().max().item())
        for optimizer in optimizers:
            optimizer.step()
    pairs = zip(net.parameters(), alone.parameters(), strict=True)
    return max(largest, *((whole(p) - q).abs().max().item() for p, q in pairs))


def placements(rank: int, ranks: int) -> dict[str, float]:
    """The differences for every placement that four ranks allow."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    everyone = slice(rank * ROWS, (rank + 1) * ROWS)
    found = {}
    for name in METHODS:
        for reshard in (True, False):
            net, alone = models()
            fully_shard(net.trunk, reshard_after_forward=reshard)
            fully_shard(net)
            found[f"FSDP2, {name}, reshard {reshard}"] = differences(net, alone, name, everyone, ranks)

        net, alone = models()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(net.trunk, mesh=mesh)
        fully_shard(net, mesh=mesh)
        found[f"HSDP, {name}"] = differences(net, alone, name, everyone, ranks)

    for name in ("PCGrad", "UPGrad"):
        net, alone = models(of_two_layers)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(net.trunk, init_device_mesh("cpu", (ranks,)), plan)
        found[f"tensor parallel, {name}"] = differences(net, alone, name, slice(0, ranks * ROWS), ranks)

        net, alone = models(of_two_layers)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(net.trunk, mesh["tensor"], plan)
        fully_shard(net.trunk, mesh=mesh["data"])
        half = mesh.get_coordinate()[0] * 2 * ROWS
        found[f"both, {name}"] = differences(net, alone, name, slice(half, half + 2 * ROWS), ranks)

    net, alone = models()
    fully_shard(net)
    found["groups"] = differences(net, alone, "UPGrad", everyone, ranks, groups="module")

    net, alone = models()
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    fully_shard(net, mp_policy=policy)
    found["mixed precision"] = differences(net, alone, "UPGrad", everyone, ranks) / 1e4  # of float32

    net, alone = models()
    ids = {id(p) for p in net.trunk[0].parameters()}
    fully_shard(net, ignored_params={p for p in net.parameters() if id(p) not in ids})
    try:
        differences(net, alone, "UPGrad", everyone, ranks)
    except ValueError as error:
        found["whole beside sharded"] = 0.0 if "is whole on every rank beside" in str(error) else 1.0
    return found


def of_two_layers() -> Net:
    """A model whose trunk can be cut by columns and rows."""
    net = Net()
    net.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return net


def models(make: Callable[[], Net] = Net) -> tuple[Net, Net]:
    """Twice the same model."""
    torch.manual_seed(0)
    net = make().double()
    return net, copy.deepcopy(net)
