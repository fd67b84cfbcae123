"""Task gradients from closures: each task computes its loss in a forward pass of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._arguments import Columns, found_parameters
from mtlfast._losses import Present
from mtlfast.jacobian._collected import Collected
from mtlfast.jacobian._rows import StoredRows


class ClosuresJacobian(StoredRows):
    """A Jacobian whose rows come from one forward and one backward pass for each task, one task after the other.

    The graph of a task is freed before the next task's forward pass. Random numbers are drawn, and BatchNorm
    statistics move, as in separate forward passes in the order of the tasks.

    Args:
        present: the K present tasks with their closures, functions without arguments that return a scalar loss.
        shared: the shared parameters; None: those that more than one task reaches.
        retain_graph: keep the graphs, which then all stay in memory.
        loss_weights_later: whether `weigh` will be called.
        storage_dtype: the dtype in which the gradients of the shared parameters are stored. None: their own.

    Raises:
        ValueError: `shared` is None and there is one task alone.

    Memory: the largest graph of one task, and the K gradients of the shared parameters. Cost: K forward and K backward
    passes.
    """

    way = "closures"

    def __init__(
        self,
        present: Present,
        shared: Columns | None,
        retain_graph: bool = False,
        loss_weights_later: bool = False,
        storage_dtype: torch.dtype | None = None,
    ) -> None:
        if shared is None and len(present.tasks) == 1:
            found_parameters([])  # before the closure runs
        super().__init__(present, shared, storage_dtype)
        self._collected = Collected("backward", shared, storage_dtype)
        self._retain_graph, self._loss_weights_later = retain_graph, loss_weights_later

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Runs the closures and their backward passes. The losses are known afterwards."""
        assert loss_weights is None  # these follow from the losses; `weigh` takes them
        values = self._collected.run(self.present, self._retain_graph)
        self.take(self._collected, apart=self._loss_weights_later)
        self.losses = torch.stack([value.to(self.device) for value in values])
