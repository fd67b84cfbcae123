"""The protocol that every aggregator keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast._by_task import take
from mtlfast._exact_state import ExactState
from mtlfast.aggregation._reads import Reads
from mtlfast.task_gradients import TaskGradients


class Aggregator(ExactState, ABC):
    """Task gradients in, one update direction out.

    `aggregator(grads)` takes `TaskGradients` and returns T tensors; `aggregator(matrix)` takes a Jacobian [K, P] and
    returns a vector [P]. `losses` [K], `loss_scale` (a float or 0-dim tensor by which the losses were multiplied) and
    `tasks` (the present tasks' indices; all tensors hold those only) are there for methods that read them.

    Attributes:
        paper: who published it where, or "".
        keeps: what it remembers from step to step for n tasks, or "".
    """

    paper: ClassVar[str] = ""
    keeps: ClassVar[str] = ""

    def forward(
        self,
        grads: TaskGradients | Tensor,
        *,
        losses: Tensor | None = None,
        loss_scale: float | Tensor | None = None,
        tasks: Sequence[int] | None = None,
    ) -> list[Tensor | None] | Tensor:
        """Aggregates; see the class."""
        if isinstance(grads, Tensor):
            (direction,) = self.aggregate(
                TaskGradients.from_matrix(grads), losses=losses, loss_scale=loss_scale, tasks=tasks
            )
            assert direction is not None
            return direction
        return self.aggregate(grads, losses=losses, loss_scale=loss_scale, tasks=tasks)

    @abstractmethod
    def aggregate(
        self,
        grads: TaskGradients,
        *,
        losses: Tensor | None,
        loss_scale: float | Tensor | None,
        tasks: Sequence[int] | None,
    ) -> list[Tensor | None]:
        """The direction, T tensors."""

    def reset(self) -> None:
        """Forgets all state, as if new."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # State has the shape that the saved run had come to; it may not be there yet, here or in what was saved.
        for name, buffer in self._buffers.items():
            if (saved := state_dict.get(prefix + name)) is not None:
                device = saved.device if buffer is None else buffer.device
                self._buffers[name] = torch.empty_like(saved, device=device)
            elif name == "state":
                self._buffers[name] = None
        super()._load_from_state_dict(state_dict, prefix, *rest)


class GramAggregator(Aggregator):
    """An aggregator that is defined by weights computed from the Gram matrix: direction = w(G)^T J."""

    # What the weights depend on: `weights` sees a Gram matrix of which no more than that is computed.
    reads = Reads.GRAM

    @abstractmethod
    def weights(
        self,
        gram: Tensor,
        *,
        losses: Tensor | None = None,
        loss_scale: float | Tensor | None = None,
        tasks: Sequence[int] | None = None,
        rtol: float | None = None,
    ) -> Tensor:
        """The tasks' weights.

        Args:
            gram: [..., K, K] float64, the Gram matrix; leading dimensions are groups.
            losses: [K], the losses' values, for methods that read them.
            loss_scale: what the losses were multiplied by, for methods with an absolute norm.
            tasks: indices of the K present tasks; None: all.
            rtol: relative precision of the gradients behind `gram`, for rank decisions; None: K * 1e-6.

        Returns:
            [..., K] float64, on gram's device; NaN where `gram` is not finite.
        """

    def diagnostics(self) -> dict[str, int]:
        """Counts of what went wrong since `reset()`, for methods that iterate; on a GPU this waits for it."""
        return {}

    def of_tasks(self, buffer: str, what: str, gram: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """The present tasks' entries of a buffer [n] that the user gave, [..., K] on gram's device.

        Raises:
            ValueError: there are more tasks than entries, or all are present and there are fewer.
        """
        values: Tensor = getattr(self, buffer)
        present = range(gram.shape[-1]) if tasks is None else tasks
        if (tasks is None and len(values) != gram.shape[-1]) or any(task >= len(values) for task in present):
            raise ValueError(
                f"{type(self).__name__}: got tasks {list(present)}, expected {len(values)} tasks as there are {what}"
            )
        if values.device != gram.device:  # once: a copy from the host waits
            values = values.to(gram.device)
            setattr(self, buffer, values)
        return take(values, present).expand(gram.shape[:-1]).clone()

    def weigh(self, grads: TaskGradients, *, need_gram: bool = False, **context: Any) -> tuple[Tensor, Tensor | None]:
        """The weights [K] for task gradients, and the Gram matrix if it was computed."""
        K = grads.num_tasks
        if self.reads is Reads.GRAM or need_gram:
            gram = ops.gram(grads)
            return self.weights(gram, rtol=precision(grads), **context), gram
        if self.reads is Reads.NORMS:
            partial = ops.norms(grads).square().diag()
        else:
            partial = torch.empty(K, K, dtype=torch.float64, device=grads.device)
        return self.weights(partial, rtol=precision(grads), **context), None

    def aggregate(self, grads: TaskGradients, **context: Any) -> list[Tensor | None]:
        """One read for the Gram matrix or the norms, if they matter, one for the weighted sum."""
        weights, _ = self.weigh(grads, **context)
        return ops.combine(grads, weights)


def precision(grads: TaskGradients) -> float:
    """`rtol` for rank decisions: K times the relative precision of the gradients behind the Gram matrix."""
    return grads.num_tasks * (torch.finfo(torch.float64).eps if grads.dtype == torch.float64 else 1e-6)
