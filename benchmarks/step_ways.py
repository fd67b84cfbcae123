"""The contestants of bench_step.py: ways to make the gradients of one training step, on one model."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torchjd.aggregation
from readme_table import LAYERS, WIDTH, Trunk
from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import PCGrad, UPGrad
from mtlfast.bench.faces import plain_rows, plain_surgery
from mtlfast.bench.peers import torchjd_backward


class Sizes(Protocol):
    """What a `Model` is made of."""

    @property
    def width(self) -> int:
        """The number of features of an example."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a batch."""

    def trunk(self) -> nn.Module:
        """A new trunk, which makes [B, width] of a batch."""


class Size(NamedTuple):
    """The sizes of the main README's transformer and of one batch."""

    width: int
    layers: int
    batch: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a batch."""
        return self.batch, self.length, self.width

    def trunk(self) -> Trunk:
        """A new trunk."""
        return Trunk(self.width, self.layers)


FULL, QUICK = Size(WIDTH, LAYERS, batch=8, length=64), Size(width=48, layers=1, batch=2, length=4)
MICRO_BATCHES, WHOLE = 2, slice(None)

# One backward pass of the summed loss: of one batch, and of the union of the tasks' batches.
PLAIN, UNION = "plain sum", "plain sum of union"
# K calls of torch.autograd.grad: each result dropped at once, all held to the end, a batch and a forward pass for each
# task, or K for each micro-batch.
BARE, HELD, BARE_EACH, BARE_MICRO = "bare", "bare, all held", "bare, K batches", "bare, micro-batches"
LOSSES, LOSSES_UPGRAD = "mtlfast", "mtlfast UPGrad"
FEATURES, CLOSURES, ACCUMULATOR = "mtlfast at=features", "mtlfast closures", "mtlfast accumulator"
TORCHJD, TORCHJD_UPGRAD, PYTORCH_PCGRAD = "TorchJD", "TorchJD UPGrad", "Pytorch-PCGrad"
AT_ONCE = ", passes at once"


class Passes:
    """Counts the seconds of forward and backward passes. Whatever else a step does is its surgery."""

    def __init__(self) -> None:
        self.forward = self.backward = 0.0

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """What runs inside counts as a forward pass."""
        start = time.perf_counter()
        yield
        self.forward += time.perf_counter() - start

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Starts from 0. What autograd does inside counts as backward passes, whoever calls it."""
        self.forward = self.backward = 0.0
        originals = {name: getattr(torch.autograd, name) for name in ("grad", "backward")}
        for name, original in originals.items():
            setattr(torch.autograd, name, partial(self._backward_pass, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(torch.autograd, name, original)

    def _backward_pass(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        self.backward += time.perf_counter() - start
        return result


class Model:
    """A trunk with K heads, and a batch for each task.

    Args:
        num_tasks: K.
        size: makes the trunk, and has the shape of a batch.
        passes: where forward passes are counted.
    """

    def __init__(self, num_tasks: int, size: Sizes, passes: Passes) -> None:
        torch.manual_seed(0)
        self.trunk = size.trunk()
        self.heads = nn.ModuleList(nn.Linear(size.width, 10) for _ in range(num_tasks))
        self.parameters = [*self.trunk.parameters(), *self.heads.parameters()]
        self._x = torch.randn(num_tasks, *size.shape)
        self._targets = torch.randn(num_tasks, num_tasks, size.shape[0], 10)  # by task and by batch
        self._passes = passes

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.heads)

    def losses(self, part: slice = WHOLE) -> tuple[Tensor, list[Tensor]]:
        """The features and the K losses of the first batch, or of a part of it."""
        with self._passes.forward_pass():
            features = self.trunk(self._x[0, part])
            return features, [self._loss(k, features, self._targets[k, 0, part]) for k in range(self.num_tasks)]

    def per_sample(self) -> tuple[Tensor, Tensor]:
        """The features and the losses [S] of the first batch's samples under the first head."""
        with self._passes.forward_pass():
            features = self.trunk(self._x[0])
            return features, (self.heads[0](features) - self._targets[0, 0]).square().mean(dim=1)

    def own_loss(self, task: int) -> Tensor:
        """The loss of a task on its own batch."""
        with self._passes.forward_pass():
            return self._loss(task, self.trunk(self._x[task]), self._targets[task, task])

    def own_losses(self) -> list[Tensor]:
        """The losses of all tasks, each on its own batch, from one forward pass of the union of the batches."""
        with self._passes.forward_pass():
            features = self.trunk(self._x.flatten(0, 1)).unflatten(0, self._x.shape[:2])
            return [self._loss(k, features[k], self._targets[k, k]) for k in range(self.num_tasks)]

    def micro_batches(self) -> Iterator[list[Tensor]]:
        """The K losses of each micro-batch, all of which are the first batch."""
        size = self._x.shape[1] // MICRO_BATCHES
        for i in range(MICRO_BATCHES):
            yield self.losses(slice(i * size, (i + 1) * size))[1]

    def _loss(self, task: int, features: Tensor, targets: Tensor) -> Tensor:
        return (self.heads[task](features) - targets).square().mean()

    def gradients(self, loss: Tensor, keep: bool) -> Sequence[Tensor | None]:
        """A bare backward pass, which keeps the graph or frees it."""
        return torch.autograd.grad(loss, self.parameters, retain_graph=keep, allow_unused=True)

    def bare(self, losses: list[Tensor]) -> None:
        """K bare backward passes, of which the last frees the graph. Each result is dropped at once."""
        for k, loss in enumerate(losses):
            self.gradients(loss, keep=k + 1 < len(losses))


def rivals(model: Model) -> dict[str, Callable[[Tensor, list[Tensor]], object]]:
    """The contestants that are not mtlfast's and take the features and the losses of one forward pass, by name."""

    def plain(features: Tensor, losses: list[Tensor]) -> None:
        torch.stack(losses).sum().backward()

    def theirs(method: str, at_once: int | None) -> Callable[[Tensor, list[Tensor]], None]:
        aggregator, parameters = getattr(torchjd.aggregation, method)(), list(model.trunk.parameters())

        def run(features: Tensor, losses: list[Tensor]) -> None:
            torchjd_backward(losses, features, parameters, aggregator, optimize=True, at_once=at_once)

        return run

    def pytorch_pcgrad(features: Tensor, losses: list[Tensor]) -> None:
        plain_surgery(plain_rows(losses, model.parameters), model.parameters)

    return {
        PLAIN: plain,
        BARE: lambda features, losses: model.bare(losses),
        TORCHJD: theirs("PCGrad", at_once=1),
        TORCHJD + AT_ONCE: theirs("PCGrad", at_once=None),
        TORCHJD_UPGRAD: theirs("UPGrad", at_once=1),
        TORCHJD_UPGRAD + AT_ONCE: theirs("UPGrad", at_once=None),
        PYTORCH_PCGRAD: pytorch_pcgrad,
    }


def ways(num_tasks: int, size: Sizes, passes: Passes) -> tuple[dict[str, Callable[[], object]], list[nn.Parameter]]:
    """The contestants by name; and the parameters to whose `.grad` they add, all but the bare ones."""
    model = Model(num_tasks, size, passes)
    trunk, pcgrad, upgrad = model.trunk, PCGrad(), UPGrad()

    def union() -> None:
        torch.stack(model.own_losses()).sum().backward()

    def held() -> None:
        rows = [model.gradients(loss, keep=k + 1 < num_tasks) for k, loss in enumerate(model.losses()[1])]
        del rows

    def bare_each() -> None:
        for k in range(num_tasks):
            model.gradients(model.own_loss(k), keep=False)

    def bare_micro() -> None:
        for losses in model.micro_batches():
            model.bare(losses)

    def at_features() -> None:
        features, losses = model.losses()
        mtlfast.backward(losses, pcgrad, at=features)

    def closures() -> None:
        mtlfast.backward([partial(model.own_loss, k) for k in range(num_tasks)], pcgrad, shared=trunk)

    def accumulator() -> None:
        accumulated = mtlfast.TaskGradientAccumulator(shared=trunk)
        for losses in model.micro_batches():
            accumulated.add(losses)
        mtlfast.backward(accumulated, pcgrad)

    def on_losses(rival: Callable[[Tensor, list[Tensor]], object]) -> Callable[[], object]:
        return lambda: rival(*model.losses())

    of_rivals = {name: on_losses(rival) for name, rival in rivals(model).items()}
    contestants: dict[str, Callable[[], object]] = {
        PLAIN: of_rivals[PLAIN],
        UNION: union,
        BARE: of_rivals[BARE],
        HELD: held,
        BARE_EACH: bare_each,
        BARE_MICRO: bare_micro,
        LOSSES: lambda: mtlfast.backward(model.losses()[1], pcgrad, shared=trunk),
        LOSSES_UPGRAD: lambda: mtlfast.backward(model.losses()[1], upgrad, shared=trunk),
        FEATURES: at_features,
        CLOSURES: closures,
        ACCUMULATOR: accumulator,
        **of_rivals,
    }
    return contestants, model.parameters
