"""A step whose arguments may differ from rank to rank, and what is to be seen of it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import mtlfast
from mtlfast.aggregation import UPGrad

TASKS = 3
LossesOf = Callable[[list[Tensor]], Any]


class Net(nn.Module):
    """A trunk of a table and a layer, a table beside it that is not shared, and a head for each task."""

    def __init__(self, sparse: bool = False, sparse_beside: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=sparse)
        self.layer = nn.Linear(4, 5)
        self.beside = nn.Embedding(6, 5, sparse=sparse_beside)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(TASKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = (self.layer(self.table(x)) + self.beside(x)).tanh()
        return [head(features).mean() for head in self.heads]


class Step:
    """Steps on one rank of several.

    Args:
        rank: this one.
        losses: what is given as losses, of the losses that the model computed.
        method: an aggregator.
        sparse: whether the shared table's gradients are sparse.
        sparse_beside: whether those of the table beside it are.
        ddp: give the group as the DistributedDataParallel module.
        dtype: of the model.
        arguments: others of `mtlfast.backward`.
    """

    def __init__(
        self,
        rank: int,
        losses: LossesOf = list,
        method: Any = None,
        sparse: bool = False,
        sparse_beside: bool = False,
        ddp: bool = False,
        dtype: torch.dtype = torch.float64,
        **arguments: Any,
    ) -> None:
        torch.manual_seed(0)  # one model on all ranks
        self.net = Net(sparse, sparse_beside).to(dtype)
        torch.manual_seed(100 + rank)
        group = DistributedDataParallel(self.net) if ddp else distributed.group.WORLD
        self.method = UPGrad() if method is None else method
        self.weighting = arguments.get("weighting")
        self.shared = [*self.net.table.parameters(), *self.net.layer.parameters()]
        self.arguments = {"shared": self.shared, "process_group": group, **arguments}
        self._x, self.losses = torch.tensor([0, 1 + rank, 3]), losses

    def run(self) -> mtlfast.StepResult:
        losses = self.losses(self.net(self._x))
        return mtlfast.backward(losses, self.method, **self.arguments)

    def refused(self) -> tuple[str | None, bool]:
        """Runs a step that fails: its error, and whether every `.grad`, all state and the random numbers stay."""
        before = self.everything()
        try:
            self.run()
        except (ValueError, TypeError, RuntimeError) as error:
            return str(error), equal(before, self.everything())
        return None, False

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.to_dense().clone() for p in self.net.parameters()]

    def state(self) -> list[tuple[str, Tensor]]:
        """The tensors that the methods keep."""
        modules = [module for module in (self.method, self.weighting) if isinstance(module, nn.Module)]
        whole = [(n, x.full_tensor() if hasattr(x, "full_tensor") else x) for m in modules for n, x in items(m)]
        return [(name, x.clone()) for name, x in whole]

    def everything(self) -> list[Tensor | None]:
        return [*self.gradients(), *(x for _, x in self.state()), torch.get_rng_state()]


def items(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in module.state_dict().items() if isinstance(x, Tensor)]


def equal(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    """Whether all bits are equal, but for those of NaN."""
    return len(a) == len(b) and all(
        (x is None and y is None)
        or (x is not None and y is not None and x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True))
        for x, y in zip(a, b, strict=True)
    )


def without(*tasks: int) -> LossesOf:
    """The losses with None for some tasks."""
    return lambda losses: [None if k in tasks else loss for k, loss in enumerate(losses)]


def closures(losses: list[Tensor]) -> list[Callable[[], Tensor]]:
    """Closures that return losses which are computed already; their graph must be retained."""
    return [partial(lambda loss: loss, loss) for loss in losses]


def named(*names: str) -> LossesOf:
    """The losses by name."""
    return lambda losses: dict(zip(names, losses, strict=True))


def accumulated(losses: list[Tensor]) -> mtlfast.TaskGradientAccumulator:
    """An accumulator with the losses in it, or an empty one without losses."""
    accumulator = mtlfast.TaskGradientAccumulator()
    if losses:
        accumulator.add(losses)
    return accumulator
