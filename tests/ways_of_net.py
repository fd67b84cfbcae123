"""A small model and one function for each way to get task gradients, which make its losses and arguments."""

import functools

import torch
from torch import Tensor, nn

from mtlfast import TaskGradientAccumulator

IDS = torch.tensor([0, 1, 1, 5])


class Net(nn.Module):
    """A table and a trunk, which K heads share."""

    def __init__(self, num_tasks: int = 3, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(7, 4, sparse=sparse)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(num_tasks))
        self.double()

    def features(self) -> Tensor:
        return self.trunk(self.table(IDS))

    def loss(self, task: int, features: Tensor | None = None) -> Tensor:
        return (self.heads[task](self.features() if features is None else features) - task).square().mean()

    def losses(self, features: Tensor | None = None) -> list[Tensor]:
        features = self.features() if features is None else features
        return [self.loss(task, features) for task in range(len(self.heads))]

    def closures(self) -> list[functools.partial]:
        return [functools.partial(self.loss, task) for task in range(len(self.heads))]

    @property
    def shared(self) -> list[nn.Module]:
        return [self.table, self.trunk]


def losses_of(net: Net):
    return net.losses(), {"shared": net.shared}


def found(net: Net):
    return net.losses(), {}


def split(net: Net):
    features = net.features()
    return net.losses(features), {"features": features}


def at_features(net: Net):
    features = net.features()
    return net.losses(features), {"at": features}


def closures(net: Net):
    return net.closures(), {}


def stored(net: Net):
    return net.losses(), {"shared": net.shared, "storage_dtype": torch.float32}


def accumulated(net: Net):
    accumulator = TaskGradientAccumulator(net.shared)
    for _ in range(2):
        accumulator.add(net.losses())
    return accumulator, {}


WAYS = {way.__name__: way for way in (losses_of, found, split, at_features, closures, stored, accumulated)}
