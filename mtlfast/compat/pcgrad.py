"""Pytorch-PCGrad's optimizer: `from mtlfast.compat.pcgrad import PCGrad` in place of `from pcgrad import PCGrad`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlfast import _grad, ops
from mtlfast._arguments import Losses, present_losses, refuse_ranks
from mtlfast._sharded import refuse_sharded
from mtlfast.aggregation import Part, RowsJacobian
from mtlfast.aggregation._jacobian import parts_of, refuse_sparse


class PCGrad(Optimizer):
    """An optimizer whose `pc_backward(losses)` takes the place of `sum(losses).backward()`.

    As the original: `random.shuffle` draws the orders, one list of the tasks that is shuffled on and on, K shuffles a
    step; a gradient meets itself as well, as it was; the projections look at all parameters of the optimizer, heads
    too. Parameters that every task reaches get the mean of the projected gradients, the others their sum; those that
    none reaches, frozen ones included, get zeros. All old gradients are forgotten.

    What the original lacks: it is a torch Optimizer, so that `param_groups`, `state_dict`, LR schedulers, GradScaler
    and hooks work.

    Args:
        optimizer: the one that steps.
        reduction: "mean" or "sum". In the original "sum" is the mean as well, and so it is here.
        strict: False: the paper's method in place of the original's. The projections look at the parameters alone that
            every task reaches; a gradient does not meet itself, and each meets the others in a fresh order; they are
            summed. Other parameters get their tasks' plain gradients, summed; those that no task reaches are left
            without one, where a zero would let weight decay and momentum move them.
        allow_local: let each rank of a process group work on its own gradients, which lets replicas drift apart.

    Raises:
        TypeError: `optimizer` is none; ValueError: `reduction` is neither.

    It differs from the original in this: parameters that are not the optimizer's get no gradients; hooks on the
    accumulation of gradients (DistributedDataParallel's) are not called; a parameter whose gradient is zero counts as
    reached, as there; products are sums in float64, so that a product near zero may have another sign.

    Cost: K backward passes, two reads of K * P and one write of P, where the original makes 2 K copies and K^2 walks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        strict: bool = True,
        allow_local: bool = False,
    ) -> None:
        # Optimizer.__init__ is not called: groups and state are the wrapped optimizer's.
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
        """The one that steps."""
        return self._optim

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self._optim.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """The optimizer's."""
        return self._optim.step(closure)

    def pc_backward(self, objectives: Losses) -> None:
        """Puts the projected and reduced gradients in `.grad` of the optimizer's parameters; their graphs are kept.

        Args:
            objectives: K scalar losses, in a list, tuple, generator, dict or [K] tensor.

        Raises:
            ValueError, TypeError: there are none, one is no scalar that depends on parameters, none reaches a parameter
            of the optimizer's, or a parameter is sharded or has a sparse gradient.
            RuntimeError: a process group of several ranks is initialised, and `allow_local` is not set.
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
        # The graphs are kept, as the original keeps them: callers may go backward again.
        rows = [torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True) for loss in losses]
        self.surgery(rows, wanted, everything)

    def surgery(
        self, rows: Sequence[Sequence[Tensor | None]], wanted: Sequence[Tensor], everything: Sequence[Tensor]
    ) -> None:
        """What `pc_backward` does after its backward passes.

        Args:
            rows: [K][T] the tasks' gradients of the parameters `wanted`, None where a task does not reach one.
            wanted: T parameters.
            everything: those and the frozen ones.
        """
        touching = [sum(row[t] is not None for row in rows) for t in range(len(wanted))]
        shared = [t for t, count in enumerate(touching) if count == len(rows)]
        others = [t for t, count in enumerate(touching) if 0 < count < len(rows)]
        if not shared and not others:
            raise ValueError(f"PCGrad: {len(rows)} objectives reach none of the parameters, expected one that does")
        K, orders = len(rows), self._orders(len(rows))
        with torch.no_grad():
            met = [*shared, *others] if self._strict else shared
            weights = torch.ones(K, dtype=torch.float64, device=wanted[0].device)
            if met:
                gram = RowsJacobian(_parts(rows, wanted, met)).gram()
                places = [[order.index(task) for task in range(K)] for order in orders]
                # host: drawn there, by Python's generator as in the original
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
        """In which order each task's gradient meets the K, drawn by Python's generator."""
        tasks, orders = list(range(num_tasks)), []
        for _ in range(num_tasks):
            if not self._strict:
                tasks = list(range(num_tasks))
            random.shuffle(tasks)
            orders.append(list(tasks))
        return orders

    # All that follows is the wrapped optimizer's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's groups."""
        return self._optim.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's state."""
        return self._optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's defaults."""
        return self._optim.defaults

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's: what was saved without this wrapper loads with it."""
        return self._optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The optimizer's."""
        self._optim.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The optimizer's."""
        self._optim.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        """Hooks, and whatever else the optimizer has."""
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
    """The chosen parameters' task gradients, a part for each dtype."""
    some = tuple(tuple(row[t] for t in chosen) for row in rows)
    names, instead = [f"parameter {t}" for t in chosen], "pass sparse=False to the embedding"
    return parts_of(some, [parameters[t] for t in chosen], lambda: refuse_sparse("PCGrad", some, names, instead))


def _write(
    parameters: Sequence[Tensor], rows: Sequence[Sequence[Tensor | None]], chosen: Sequence[int], weights: Tensor
) -> None:
    for _, grads in _parts(rows, parameters, chosen) if chosen else ():
        assert grads.parameters is not None
        _grad.commit(_grad.weighted(grads.parameters, grads, weights, [False] * len(grads.parameters)))
