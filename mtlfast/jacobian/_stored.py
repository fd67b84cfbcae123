"""The stored Jacobian: one backward pass for each task, all task gradients held at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast.aggregation import RowsJacobian
from mtlfast.jacobian._base import Jacobian
from mtlfast.jacobian._graph import reached_leaves
from mtlfast.task_gradients import TaskGradients


class StoredJacobian(RowsJacobian, Jacobian):
    """K backward passes through one graph; the kernels answer from the rows that autograd made.

    Args:
        losses: the K present tasks' scalar losses.
        parameters: the shared parameters that want a gradient.
        retain_graph: keep the graph; else the last task's pass frees it.
        loss_weights_later: `write` will be given loss weights, so that the plain gradients are kept apart by task.

    Raises:
        ValueError: the losses reach none of the parameters.

    Memory: the K gradients of the shared parameters; one sum for every other leaf. Cost: K backward passes.
    """

    plan = "stored"

    def __init__(
        self,
        losses: Sequence[Tensor],
        parameters: Sequence[Tensor],
        retain_graph: bool = False,
        loss_weights_later: bool = False,
    ) -> None:
        """See the class."""
        leaves = reached_leaves(losses)
        shared, reached = {id(p) for p in parameters}, {id(leaf) for leaf in leaves}
        if not shared & reached:
            raise ValueError(
                f"backward: the losses reach none of the {len(parameters)} shared parameters, expected at least one"
            )
        self.parameters = tuple(parameters)
        self._losses, self._retain_graph = losses, retain_graph
        self._others = _grad.PlainGradients([leaf for leaf in leaves if id(leaf) not in shared], loss_weights_later)
        self._num_tasks = len(losses)
        self._ours: list[bool] = []

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """K backward passes; see `Jacobian.obtain`."""
        inputs, T = [*self.parameters, *self._others.leaves], len(self.parameters)
        rows = []
        for k, loss in enumerate(self._losses):
            keep = self._retain_graph or k < len(self._losses) - 1
            weight = None if loss_weights is None else loss_weights[k].to(loss.dtype)
            gradients = torch.autograd.grad(loss, inputs, weight, retain_graph=keep, allow_unused=True)
            rows.append(gradients[:T])
            self._others.collect(k, gradients[T:])
            del gradients  # what is held twice cannot become a `.grad`
        held = tuple(rows)
        del rows
        self._ours = _grad.exclusive(held)
        self._rows = TaskGradients.from_rows(held, self.parameters)

    def write(self, weights: Tensor, loss_weights: Tensor | None = None) -> None:
        """See `Jacobian.write`."""
        self.check_weights(weights)
        with torch.no_grad():
            plain = self._others.prepared(loss_weights)
            _grad.add_weighted(self.parameters, self._rows, weights, self._ours)
            _grad.add(plain)

    def put(self, direction: Sequence[Tensor | None], loss_weights: Tensor | None = None) -> None:
        """See `Jacobian.put`."""
        with torch.no_grad():
            plain = self._others.prepared(loss_weights)
            shared = _grad.prepared(self.parameters, direction, [True] * len(self.parameters))
            _grad.add([*shared, *plain])
