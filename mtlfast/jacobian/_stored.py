"""The stored Jacobian: one backward pass for each task, with all task gradients in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mtlfast import _grad
from mtlfast._arguments import Columns, found_parameters
from mtlfast._losses import Present
from mtlfast._sharded import refuse_sharded
from mtlfast.jacobian._graph import Reached, reached_by
from mtlfast.jacobian._overwriting import Overwriting
from mtlfast.jacobian._rows import StoredRows
from mtlfast.jacobian._sequential import Pass, sequential


class StoredJacobian(StoredRows):
    """A Jacobian whose rows come from K backward passes through one graph, and stay where autograd put them.

    Args:
        present: the K present tasks with their losses.
        shared: the shared parameters that require grad; None: those that more than one loss reaches.
        retain_graph: keep the graph. Otherwise the last task's backward pass frees it.
        loss_weights_later: whether `weigh` or `write` will be given loss weights. The plain gradients are then kept
            apart by task.
        walked: what a walk of the losses' graph found; None: walk it here.
        storage_dtype: the dtype in which the gradients of the shared parameters are stored. None: their own.

    Raises:
        ValueError: the losses reach none of the parameters, or a parameter is sharded or hidden from autograd.

    Memory: the K gradients of the shared parameters, and one sum for every other leaf. Cost: K backward passes.
    """

    way = "stored"

    def __init__(
        self,
        present: Present,
        shared: Columns | None,
        retain_graph: bool = False,
        loss_weights_later: bool = False,
        walked: Reached | None = None,
        storage_dtype: torch.dtype | None = None,
    ) -> None:
        reached = reached_by(present.losses) if walked is None else walked
        reached.check("backward", retain_graph)
        if shared is None:
            reached.check_told_apart("backward")
            shared = found_parameters(reached.several)
        own = {id(p) for p in shared.parameters}
        others = [leaf for leaf in reached.leaves if id(leaf) not in own]
        refuse_sharded("backward", shared.names, shared.parameters, others)
        if walked is None and not any(id(leaf) in own for leaf in reached.leaves):
            raise ValueError(
                f"backward: the losses reach none of the {len(own)} shared parameters, expected at least one"
            )
        super().__init__(present, shared, storage_dtype)
        self.losses = torch.stack([loss.detach().to(self.device) for loss in present.losses])
        self._reached, self._retain_graph = reached, retain_graph
        self._others = _grad.PlainGradients(others, loss_weights_later)

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Runs K backward passes, or fewer on the CPU if there are loss weights of 0.

        On the CPU a task whose loss weight is 0 needs no backward pass, and its row is None. On a GPU the host cannot
        read the weight without waiting; the backward pass then gives zeros, and the mask keeps the task out of the
        solve. Two cases need the pass on the CPU too. If all weights are 0, every task has one, so that `.grad` becomes
        zeros. A loss that is not finite always has one, so that `.grad` shows it.
        """
        rows: list[Sequence[Tensor | None]] = [(None,) * len(self.parameters)] * self.num_tasks
        self.obtain_into(rows.__setitem__, loss_weights)
        held = tuple(map(tuple, rows))
        del rows
        self.hold(held)

    def obtain_into(
        self, receive: Callable[[int, Sequence[Tensor | None]], None], loss_weights: Tensor | None = None
    ) -> None:
        """Hands over each row as soon as its backward pass has made it."""
        inputs, T = [*self.parameters, *self._others.leaves], len(self.parameters)
        wanted = range(self.num_tasks) if loss_weights is None else self._tasks_with_weight(loss_weights)
        for k, gradients in self._passes(loss_weights, wanted, inputs):
            self._others.collect(k, gradients[T:])
            row = self.keep(gradients[:T])
            del gradients  # a second reference would keep these from becoming `.grad`
            receive(k, row)
            del row

    def _passes(self, weights: Tensor | None, wanted: Sequence[int], inputs: Sequence[Tensor]) -> Iterator[Pass]:
        """The backward passes of the wanted tasks, each with its gradients of the inputs."""
        losses = self.present.losses
        overwriting = Overwriting(self._reached, [losses[k] for k in wanted])
        return sequential(losses, weights, wanted, inputs, self._retain_graph, overwriting)
