"""Pytorch-PCGrad's optimizer: `from mtlfast.compat.pcgrad import PCGrad` in place of `from pcgrad import PCGrad`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlfast import _grad, ops
from mtlfast._arguments import refuse_ranks
from mtlfast._losses import Losses, present_losses
from mtlfast._sharded import refuse_sharded
from mtlfast.aggregation import Part, RowsJacobian, parts_of
from mtlfast.aggregation._jacobian import refuse_sparse
from mtlfast.training._wrapped_optimizer import WrappedOptimizer


class PCGrad(WrappedOptimizer):
    """Wraps an optimizer. Its `pc_backward(losses)` takes the place of `sum(losses).backward()`.

    It does what Pytorch-PCGrad does. `random.shuffle` draws the orders: one list of the tasks is shuffled again and
    again, K times a step. Each gradient is also compared with itself. The projections use all parameters of the
    optimizer, those of heads too. A parameter that every task reaches gets the mean of the projected gradients, another
    parameter their sum, and one that no task reaches, such as a frozen one, gets zeros. Old gradients are overwritten.

    Unlike Pytorch-PCGrad's class it is a torch Optimizer, so that `param_groups`, `state_dict`, LR schedulers,
    GradScaler and hooks work.

    Args:
        optimizer: the optimizer that takes the steps.
        reduction: "mean" or "sum". Both mean the mean here, as in Pytorch-PCGrad.
        strict: True does what Pytorch-PCGrad does. False does what the paper says: the projections use only parameters
            that every task reaches, no gradient is compared with itself, each gradient has a random order of its own,
            and the results are summed. Other parameters then get the sum of their tasks' plain gradients. Parameters
            that no task reaches get no gradient, because weight decay and momentum would move them if it were zero.
        allow_local: permit several ranks of a process group to work each on its own gradients, which lets the replicas
            drift apart.

    Raises:
        TypeError: `optimizer` is not a torch Optimizer.
        ValueError: `reduction` is neither.

    Differences from Pytorch-PCGrad: parameters of other optimizers get no gradients. Hooks on the accumulation of
    gradients, such as those of DistributedDataParallel, are not called. Dot products are summed in float64, so that one
    near zero may have another sign.

    Cost: K backward passes, two reads of K * P and one write of P. Pytorch-PCGrad copies the gradients 2 K times and
    reads them K^2 times.
    """

    _reduction: str
    _strict: bool
    _allow_local: bool

    def __init__(
        self,
        optimizer: Optimizer,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        strict: bool = True,
        allow_local: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"PCGrad: reduction is {reduction!r}, expected 'mean' or 'sum'")
        super().__init__(optimizer, _reduction=reduction, _strict=strict, _allow_local=allow_local)

    def pc_backward(self, objectives: Losses) -> None:
        """Projects and reduces the gradients, and puts the results in `.grad` of the optimizer's parameters.

        The graphs of the losses are kept.

        Args:
            objectives: K scalar losses, in a list, tuple, generator, dict or [K] tensor.

        Raises:
            ValueError, TypeError: there are no objectives, one is not a scalar that depends on parameters, none reaches
                a parameter of the optimizer, or a parameter is sharded or has a sparse gradient.
            RuntimeError: a process group of several ranks is initialised and `allow_local` is False.
        """
        refuse_ranks("PCGrad", self._allow_local)
        losses = present_losses(objectives, "PCGrad", "objective", may_be_absent=False).losses
        everything = [parameter for group in self.param_groups for parameter in group["params"]]
        wanted = [parameter for parameter in everything if parameter.requires_grad]
        if not wanted:
            raise ValueError(
                f"PCGrad: none of the optimizer's {len(everything)} parameters requires grad, expected at least one"
            )
        refuse_sharded("PCGrad", [f"parameter {i}" for i in range(len(wanted))], wanted)
        # The graphs are kept, as Pytorch-PCGrad keeps them, so that callers may run another backward pass.
        rows = [torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True) for loss in losses]
        self.surgery(rows, wanted, everything)

    def surgery(
        self, rows: Sequence[Sequence[Tensor | None]], wanted: Sequence[Tensor], everything: Sequence[Tensor]
    ) -> None:
        """Does what `pc_backward` does after its backward passes.

        Args:
            rows: [K][T] the tasks' gradients of the parameters `wanted`, or None if a task does not reach one.
            wanted: T parameters.
            everything: these parameters and the frozen ones.
        """
        touching = [sum(row[t] is not None for row in rows) for t in range(len(wanted))]
        shared = [t for t, count in enumerate(touching) if count == len(rows)]
        others = [t for t, count in enumerate(touching) if 0 < count < len(rows)]
        if not shared and not others:
            raise ValueError(f"PCGrad: {len(rows)} objectives reach none of the parameters, expected at least one")
        K, orders = len(rows), self._orders(len(rows))
        with torch.no_grad():
            met = [*shared, *others] if self._strict else shared
            weights = torch.ones(K, dtype=torch.float64, device=wanted[0].device)
            if met:
                gram = RowsJacobian(_parts(rows, wanted, met)).gram()
                places = [[order.index(task) for task in range(K)] for order in orders]
                # host: Python's generator draws the orders, as in Pytorch-PCGrad
                keys = torch.tensor(places, dtype=torch.float64, device=gram.device)
                weights = ops.solve(gram, "pcgrad", {"mean": False, "itself": self._strict}, {"keys": keys})
            before = _grad.forget(everything)
            mean = weights / K if self._strict else weights
            try:
                _write(wanted, rows, shared, mean)
                _write(wanted, rows, others, weights if self._strict else torch.ones_like(weights))
                if self._strict:
                    _grad.fill_with_zeros(everything)
            except BaseException:
                _grad.bring_back(everything, before)
                raise

    def _orders(self, num_tasks: int) -> list[list[int]]:
        """The order of the K tasks for each task's gradient, drawn by Python's generator."""
        tasks, orders = list(range(num_tasks)), []
        for _ in range(num_tasks):
            if not self._strict:
                tasks = list(range(num_tasks))
            random.shuffle(tasks)
            orders.append(list(tasks))
        return orders

    def __repr__(self) -> str:
        return f"PCGrad(reduction={self._reduction!r}, strict={self._strict}, optimizer={self._optim!r})"


def _parts(rows: Sequence[Sequence[Tensor | None]], parameters: Sequence[Tensor], chosen: Sequence[int]) -> list[Part]:
    """The task gradients of the chosen parameters, one part for each dtype and device."""
    some = tuple(tuple(row[t] for t in chosen) for row in rows)
    try:
        return parts_of(some, [parameters[t] for t in chosen])
    except TypeError:
        refuse_sparse("PCGrad", some, [f"parameter {t}" for t in chosen], "pass sparse=False to the embedding")
        raise


def _write(
    parameters: Sequence[Tensor], rows: Sequence[Sequence[Tensor | None]], chosen: Sequence[int], weights: Tensor
) -> None:
    for _, grads in _parts(rows, parameters, chosen) if chosen else ():
        assert grads.parameters is not None
        _grad.commit(_grad.weighted(grads.parameters, grads, weights, [False] * len(grads.parameters)))
