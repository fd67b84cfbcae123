"""Trains the network of examples/digits in several processes, and again in one, whose weights must be the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import mtlfast
from mtlfast.aggregation import PCGrad

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from data import Canvases, Digits, epoch, overlay, split_digits
from model import Network
from tasks import TASKS

SEED, BATCH, LEARNING_RATE = 0, 100, 3e-3  # a batch is that of all ranks together
ALIKE = 1e-9  # the largest difference of two weights that rounding may make


def fresh() -> Network:
    """The network with its initial weights, which are the same in every process."""
    torch.manual_seed(SEED)
    return Network(TASKS).double()


def train(
    network: nn.Module,
    trunk: nn.Module,
    digits: Digits,
    epochs: int,
    rank: int,
    ranks: int,
    tick: Callable[[], object],
    process_group: object = None,
) -> None:
    """Trains on this rank's part of each batch.

    Args:
        network: what the canvases go through: the plain module, or the one that DistributedDataParallel or FSDP2 made.
        trunk: its part that the tasks share.
        digits: for training.
        epochs: each shows every training digit once on the left and once on the right.
        rank: this process's number.
        ranks: the number of processes.
        tick: called after each epoch.
        process_group: as in `mtlfast.backward`.
    """
    aggregator = PCGrad()  # its random orders are those of rank 0
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    pairs = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for batch in epoch(digits, BATCH, pairs):
            own = Canvases(*(of_all[rank::ranks] for of_all in batch))
            losses = [task.loss(output, own) for task, output in zip(TASKS, network(own.canvas), strict=True)]
            optimizer.zero_grad()
            mtlfast.backward(losses, aggregator, shared=trunk, process_group=process_group)
            optimizer.step()
        tick()


def train_together(fsdp2: bool, digits: Digits, epochs: int) -> Tensor:
    """Trains on all ranks.

    Returns:
        All weights, [P].
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if BATCH % ranks:
        raise ValueError(f"{ranks} processes cannot share {BATCH} canvases evenly, expected a divisor")
    network = fresh()
    with tqdm(total=epochs, unit=" epochs", desc=f"{ranks} processes", disable=rank > 0) as bar:
        if fsdp2:
            fully_shard(network.trunk)
            fully_shard(network)
            train(network, network.trunk, digits, epochs, rank, ranks, bar.update)
        else:
            ddp = DistributedDataParallel(network)
            train(ddp, network.trunk, digits, epochs, rank, ranks, bar.update, process_group=ddp)
    return weights_of(network)


def train_alone(digits: Digits, epochs: int) -> Network:
    """Trains in this process alone, on the whole batches."""
    network = fresh()
    with tqdm(total=epochs, unit=" epochs", desc="1 process") as bar:
        train(network, network.trunk, digits, epochs, 0, 1, bar.update)
    return network


def weights_of(network: nn.Module) -> Tensor:
    """All weights, [P]. Sharded ones are gathered."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in network.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


@torch.no_grad()
def metrics(network: Network, digits: Digits) -> Table:
    """How well the tasks are learned, on canvases of digits that are not trained on."""
    generator = torch.Generator().manual_seed(SEED)
    canvases = overlay(digits, *(torch.randperm(len(digits.classes), generator=generator) for _ in range(2)))
    table = Table("task", "metric", title="On new digits")
    for task, output in zip(TASKS, network(canvases.canvas), strict=True):
        table.add_row(task.name, f"{task.metric(output, canvases).item():.2f} {task.metric_name}")
    return table


def main(
    fsdp2: Annotated[bool, typer.Option("--fsdp2/--ddp", help="How the processes share the work.")],
    epochs: Annotated[int, typer.Option(min=1, help="Of each training.")] = 5,
) -> None:
    """Trains four tasks with PCGrad in several processes, which `torchrun` starts, and then in one."""
    torch.set_num_threads(1)  # the network is small
    dist.init_process_group("gloo")
    train_digits, test_digits = (Digits(d.images.double(), d.classes) for d in split_digits(SEED, torch.device("cpu")))
    weights, rank = train_together(fsdp2, train_digits, epochs), dist.get_rank()
    dist.barrier()  # a rank that leaves early would end the collectives of the others
    dist.destroy_process_group()
    if rank > 0:
        return
    alone = train_alone(train_digits, epochs)
    difference = (weights - weights_of(alone)).abs().max().item()
    Console().print(metrics(alone, test_digits))
    print(f"Largest difference of a weight (float64): {difference:.1e}")
    if not difference < ALIKE:
        raise SystemExit("The weights of several processes are not those of one.")
    print("The weights are those of one process.")


if __name__ == "__main__":
    typer.run(main)
