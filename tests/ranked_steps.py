"""Training that several ranks and a single process must agree about."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtlfast
from mtlfast import aggregation, weighting
from mtlfast.distributed import _choose
from mtlfast.distributed._all_reduced import AllReduced

STEPS, ROWS, TASKS = 20, 4, 3  # rows: examples of a rank in a step


class Net(nn.Module):
    """A trunk whose parameters cut into uneven pieces, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(TASKS))

    def forward(self, x: Tensor, at_features: bool = False) -> Any:
        features = self.trunk(x)
        outputs = [head(features.tanh()).squeeze(-1) for head in self.heads]
        return (features, outputs) if at_features else outputs


class Case(NamedTuple):
    """A way to train.

    Attributes:
        method: makes the aggregator.
        options: arguments of `mtlfast.backward`, or functions of the trunk that make them.
        weighting: makes the loss weighting of the trunk.
        form: how the losses are given.
        absent: whether tasks are absent on some ranks.
        dtype: of the model.
    """

    method: Callable[[], Any]
    options: Mapping[str, Any] = MappingProxyType({})
    weighting: Callable[[nn.Module], Any] = lambda trunk: None
    form: str = "losses"
    absent: bool = False
    dtype: torch.dtype = torch.float64


CASES = {
    "PCGrad": Case(aggregation.PCGrad),
    "PCGrad, own generator": Case(lambda: aggregation.PCGrad(generator=torch.Generator().manual_seed(3))),
    "UPGrad": Case(aggregation.UPGrad),
    "NashMTL": Case(aggregation.NashMTL),
    "GradVac": Case(aggregation.GradVac),
    "IMTLG": Case(aggregation.IMTLG),
    "Sum": Case(aggregation.Sum),
    "GradDrop": Case(aggregation.GradDrop),
    "TrimmedMean": Case(partial(aggregation.TrimmedMean, 1)),
    "MoCo": Case(aggregation.MoCo),
    "ExcessMTL": Case(aggregation.ExcessMTL),
    "PseudoMomentum": Case(partial(aggregation.PseudoMomentum, TASKS)),
    "by tensor": Case(aggregation.PCGrad, {"groups": "tensor"}),
    "by module": Case(aggregation.UPGrad, {"groups": "module"}),
    "GradNorm": Case(
        aggregation.UPGrad, weighting=lambda trunk: weighting.GradNorm(TASKS, layers=list(trunk[3].parameters()))
    ),
    "DWA": Case(aggregation.PCGrad, weighting=lambda trunk: weighting.DWA(TASKS)),
    "random loss weights": Case(aggregation.MGDA, weighting=lambda trunk: weighting.Random()),
    "accumulated": Case(aggregation.UPGrad, form="accumulated"),
    "added up in .grad": Case(aggregation.UPGrad, form="twice"),
    "closures": Case(aggregation.UPGrad, form="closures"),
    "closures, weighted": Case(aggregation.UPGrad, weighting=lambda trunk: weighting.DWA(TASKS), form="closures"),
    "names": Case(aggregation.UPGrad, form="dict"),
    "two batches": Case(partial(aggregation.MoDo, TASKS), form="second"),
    "at features": Case(aggregation.UPGrad, form="at"),
    "GradDrop at features": Case(aggregation.GradDrop, form="at"),
    "absent": Case(aggregation.PCGrad, absent=True),
    "absent, state": Case(aggregation.NashMTL, absent=True),
    "absent, by element": Case(aggregation.MoCo, absent=True),
    "absent, weighted": Case(aggregation.UPGrad, weighting=lambda trunk: weighting.DWA(TASKS), absent=True),
    "absent, accumulated": Case(aggregation.UPGrad, form="accumulated", absent=True),
    "float32": Case(aggregation.UPGrad, dtype=torch.float32),
    "float32, PCGrad": Case(aggregation.PCGrad, dtype=torch.float32),
    "stored in float32": Case(aggregation.UPGrad, {"storage_dtype": torch.float32}),
}


def batch(step: int, ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The examples of all ranks in a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ranks * ROWS, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(ranks * ROWS, TASKS, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def there(case: Case, step: int, rank: int, task: int) -> bool:
    """Whether a rank has a task in a step. In some steps a rank has none, and in some a task is nowhere."""
    if not case.absent:
        return True
    without_any = step % 7 == 3 and rank == 1 and case.form != "accumulated"  # an empty accumulator is refused
    return (step * 5 + rank * 3 + task * 2) % 4 != 0 and not without_any


def model(case: Case) -> Net:
    """The same one on all ranks."""
    torch.manual_seed(0)
    return Net().to(case.dtype)


def train(case: Case, net: Net, run: Callable[..., Any], step_losses: Callable[..., Any], ranks: int) -> Tensor:
    """All parameters after the steps.

    Args:
        case: how to train.
        net: the model.
        run: takes losses, the aggregator and the arguments of `mtlfast.backward`.
        step_losses: (step, part of the batch) -> the losses, with None for absent tasks, and the features.
        ranks: their number.
    """
    method, weigh = case.method(), case.weighting(net.trunk)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    options = {"shared": net.trunk, "weighting": weigh, **case.options}
    accumulator = mtlfast.TaskGradientAccumulator(net.trunk)
    for step in range(STEPS):
        optimizer.zero_grad()
        if case.form == "accumulated":
            for part in range(2):
                losses, _ = step_losses(step, part)
                if any(loss is not None for loss in losses):
                    accumulator.add(losses)
            run(accumulator, method, **{**options, "shared": None})
        elif case.form == "twice":
            for part in range(2):
                run(step_losses(step, part)[0], method, loss_scale=0.5, **options)
        elif case.form == "closures":
            losses = [lambda k=k, step=step: step_losses(step, 0)[0][k] for k in range(TASKS)]
            run(losses, method, **options)
        elif case.form == "second":
            run(step_losses(step, 0)[0], method, second=step_losses(step, 1)[0], **options)
        elif case.form == "at":
            losses, features = step_losses(step, 0)
            run(losses, method, **{**options, "shared": None, "at": features})
        elif case.form == "dict":
            run(dict(zip("abc", step_losses(step, 0)[0], strict=True)), method, **options)
        else:
            run(step_losses(step, 0)[0], method, **options)
        optimizer.step()
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])


def losses_of(case: Case, outputs: Sequence[Tensor], y: Tensor, step: int, rank: int) -> list[Tensor | None]:
    """A rank's losses."""
    return [
        (output - y[:, k]).square().mean() if there(case, step, rank, k) else None for k, output in enumerate(outputs)
    ]


def on_rank(rank: int, ranks: int, mode: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Trains on one rank of several, each case from the same start.

    Args:
        rank: this one.
        ranks: their number.
        mode: "pieces" or "whole" gradients of DistributedDataParallel, or "FSDP2".
        names: of the cases.
    """
    found = {}
    for name in names:
        case = CASES[name]
        net = model(case)
        if mode == "FSDP2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(net.trunk[0])
            fully_shard(net)
            called, run = net, mtlfast.backward
        else:
            called = DistributedDataParallel(net)
            run = partial(mtlfast.backward, process_group=called)
        torch.manual_seed(7 + 100 * rank)  # ranks have random numbers of their own

        def step_losses(step: int, part: int, case: Case = case, called: nn.Module = called) -> Any:
            x, y = batch(2 * step + part, ranks, case.dtype)
            own = slice(rank * ROWS, (rank + 1) * ROWS)
            features, outputs = called(x[own], at_features=True)
            return losses_of(case, outputs, y[own], step, rank), features

        reduction = AllReduced if mode == "whole" else _choose.Scattered
        with mock.patch.object(_choose, "Scattered", reduction):
            found[name] = train(case, net, run, step_losses, ranks)
    return found


def alone(name: str, ranks: int) -> Tensor:
    """Trains in a single process on the batches of all ranks. A task's loss is the mean of the ranks' losses."""
    case = CASES[name]
    net = model(case)
    torch.manual_seed(7)

    def step_losses(step: int, part: int) -> Any:
        x, y = batch(2 * step + part, ranks, case.dtype)
        features, outputs = net(x, at_features=True)
        of_ranks = [
            losses_of(case, [o[r * ROWS : (r + 1) * ROWS] for o in outputs], y[r * ROWS : (r + 1) * ROWS], step, r)
            for r in range(ranks)
        ]
        means: list[Tensor | None] = []
        for of_task in zip(*of_ranks, strict=True):
            some = [loss for loss in of_task if loss is not None]
            means.append(sum(some) / ranks if some else None)  # type: ignore[arg-type]
        return means, features

    return train(case, net, mtlfast.backward, step_losses, ranks)
