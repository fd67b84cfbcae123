"""Training that is saved on some ranks and goes on on others."""

from typing import Any

import torch
import torch.distributed.checkpoint as checkpoint
from ranked_steps import ROWS, Net, batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtlfast
from mtlfast.aggregation import GradVac, MoCo

EXAMPLES = 12  # of a step, whatever the number of ranks
METHODS = {"MoCo": MoCo, "GradVac": lambda: GradVac(generator=torch.Generator().manual_seed(1))}


def steps(net: nn.Module, method: Any, trunk: nn.Module, options: dict[str, Any], part: slice, first: int) -> None:
    """Three steps from the given one on."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(first, first + 3):
        x, y = batch(step, EXAMPLES // ROWS, torch.float64)
        optimizer.zero_grad()
        outputs = net(x[part])
        losses = [(output - y[part, k]).square().mean() for k, output in enumerate(outputs)]
        mtlfast.backward(losses, method, shared=trunk, **options)
        optimizer.step()


def made(mode: str) -> tuple[Net, nn.Module, dict[str, Any]]:
    """The model, what is called, and the arguments of `mtlfast.backward`."""
    torch.manual_seed(0)
    net = Net().double()
    if mode == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net)
        return net, net, {}
    if mode == "alone":
        return net, net, {}
    called = DistributedDataParallel(net)
    return net, called, {"process_group": called}


def own(rank: int, ranks: int) -> slice:
    """This rank's examples."""
    return slice(rank * EXAMPLES // ranks, (rank + 1) * EXAMPLES // ranks)


def save(rank: int, ranks: int, mode: str, folder: str) -> None:
    """Trains for three steps, and saves."""
    for name, make in METHODS.items():
        net, called, options = made(mode)
        method = make()
        steps(called, method, net.trunk, options, own(rank, ranks), 0)
        state = {"model": net.state_dict(), "aggregator": method.state_dict()}
        checkpoint.save(state, checkpoint_id=f"{folder}/{name}")


def go_on(rank: int, ranks: int, mode: str, folder: str) -> dict[str, Tensor]:
    """Loads, trains for three more steps, and returns the parameters."""
    found = {}
    for name, make in METHODS.items():
        net, called, options = made(mode)
        method = make()
        state = {"model": net.state_dict()}
        checkpoint.load(state, checkpoint_id=f"{folder}/{name}")
        net.load_state_dict(state["model"])
        method.load_state_dict(mtlfast.distributed.load_state(f"{folder}/{name}", "aggregator"))
        steps(called, method, net.trunk, options, own(rank, ranks), 3)
        parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
        found[name] = torch.cat([p.detach().flatten() for p in parameters])
    return found


def alone(name: str) -> Tensor:
    """All six steps in a single process."""
    net, _, _ = made("alone")
    method = METHODS[name]()
    for first in (0, 3):
        steps(net, method, net.trunk, {}, slice(None), first)
    return torch.cat([p.detach().flatten() for p in net.parameters()])
