"""Pytorch-PCGrad's optimizer: `from mtlfast.compat.pcgrad import PCGrad` in place of `from pcgrad import PCGrad`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlfast import _grad, ops
from mtlfast._arguments import refuse_ranks
from mtlfast._losses import Losses, present_losses
from mtlfast._sharded import refuse_sharded
from mtlfast.aggregation import Part, RowsJacobian
from mtlfast.aggregation._jacobian import parts_of, refuse_sparse


class PCGrad(Optimizer):
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

    def __init__(
        self,
        optimizer: Optimizer,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        strict: bool = True,
        allow_local: bool = False,
    ) -> None:
        # Optimizer.__init__ is not called, because groups and state are those of the wrapped optimizer.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"PCGrad: optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"PCGrad: reduction is {reduction!r}, expected 'mean' or 'sum'")
        self._optim = optimizer
        self._reduction = reduction
        self._strict = strict
        self._allow_local = allow_local

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._optim

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Calls `zero_grad` of the wrapped optimizer."""
        self._optim.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Calls `step` of the wrapped optimizer."""
        return self._optim.step(closure)

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

    # What follows forwards to the wrapped optimizer.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the wrapped optimizer."""
        return self._optim.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer."""
        return self._optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the wrapped optimizer."""
        return self._optim.defaults

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the wrapped optimizer, so that one saved without this wrapper can be loaded with it."""
        return self._optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of the wrapped optimizer."""
        self._optim.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the wrapped optimizer."""
        self._optim.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        """Hooks and all other attributes are those of the wrapped optimizer."""
        if name.startswith("__") or "_optim" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._optim, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_optim", "_reduction", "_strict", "_allow_local")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

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
