"""Task gradients accumulated over micro-batches, so that surgery runs once for each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlfast._arguments import Shared, given_parameters, trained
from mtlfast._losses import Losses, Present, present_losses
from mtlfast.jacobian._collected import Collected
from mtlfast.jacobian._rows import StoredRows
from mtlfast.ops._check import check_dtype

CLASS = "TaskGradientAccumulator"
STATE = ("gradients", "micro_batches", "number", "names", "counts", "losses")  # the entries of its `state_dict()`


class TaskGradientAccumulator:
    """Adds up each task's gradients over micro-batches. `mtlfast.backward` takes it in place of losses.

    One surgery on the accumulated task gradients is that of one large batch, if the losses are means over micro-batches
    of equal size and the model has no BatchNorm. (`loss_scale=1 / N` in `mtlfast.backward` runs one surgery for each
    micro-batch instead.) A task that is absent from some micro-batches counts by those that it was in.

    After `mtlfast.backward` the accumulator is empty, ready for the next step. If that call refuses an argument, the
    gradients stay. If it fails later, they are lost. Parameters that are frozen by then are left alone.

    Args:
        shared: the parameters that the tasks share, as in `mtlfast.backward`. They may be frozen and unfrozen between
            steps: a step takes those that require grad. None: the parameters that more than one task has reached in the
            micro-batches of a step.
        reduction: "mean" divides a task's gradients and loss by the number of micro-batches that it was in. "sum" does
            not, for losses that are divided already or summed over samples.
        storage_dtype: the dtype in which the gradients of shared parameters are kept and added up, as in
            `mtlfast.backward`. None: their own.

    A deep copy belongs to copied parameters, as that of an optimizer does: copy the model in the same call.

    Memory: a gradient of each parameter for each task that reaches it, also outside `shared`, because a weighting may
    weigh them in the end; and one task's gradients while they are added. Cost: K backward
    passes for each micro-batch.

    Example:
        >>> import torch, mtlfast
        >>> from mtlfast.aggregation import PCGrad
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> accumulator = mtlfast.TaskGradientAccumulator(shared=[w])
        >>> for a in (1.0, 3.0):
        ...     accumulator.add([a * w[0], w[1] - w[0]])
        >>> step = mtlfast.backward(accumulator, PCGrad())
        >>> step.norms ** 2
        tensor([4.0000, 2.0000], dtype=torch.float64)
        >>> len(accumulator)
        0
    """

    def __init__(
        self,
        shared: Shared | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        storage_dtype: torch.dtype | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{CLASS}: reduction is {reduction!r}, expected "mean" or "sum"')
        self._shared = None if shared is None else given_parameters(shared, CLASS)
        if self._shared is not None:
            trained(self._shared, CLASS)
        if storage_dtype is not None:
            check_dtype(CLASS, storage_dtype, "storage_dtype is")
        self._reduction, self._storage_dtype = reduction, storage_dtype
        self.reset()

    def reset(self) -> None:
        """Forgets the gradients of all micro-batches."""
        self._collected = Collected(f"{CLASS}.add", self._shared, self._storage_dtype)
        self._micro_batches = 0
        self._number = 0  # of all tasks, present or not
        self._names: dict[int, str] = {}
        self._counts: dict[int, int] = {}  # in how many micro-batches each task was
        self._losses: dict[int, Tensor] = {}  # the sum over these

    def __len__(self) -> int:
        """The number of micro-batches that were added since the last step."""
        return self._micro_batches

    def add(self, losses: Losses, *, retain_graph: bool = False) -> None:
        """Runs the backward passes of one micro-batch, and adds its task gradients.

        Args:
            losses: K scalar losses or closures, as `mtlfast.backward` takes them. Every micro-batch of a step has the
                same K entries in the same order; None stands for a task that is absent from this one.
            retain_graph: keep the graph for another backward pass.

        Raises:
            ValueError, TypeError: a loss or a parameter does not fit, or a name stands for another task than before.
            RuntimeError: an earlier call failed in the middle, so that a part of a micro-batch is in the sums.
        """
        caller = f"{CLASS}.add"
        self._refuse_part(caller)
        present = present_losses(losses, caller, may_be_closures=True)
        if self._micro_batches and present.number != self._number:
            raise ValueError(f"{caller}: got {present.number} losses, expected {self._number} as in the first call")
        self._check_names(caller, present)
        values = self._collected.run(present, retain_graph)
        self._number, self._micro_batches = present.number, self._micro_batches + 1
        for k, task in enumerate(present.tasks):
            self._counts[task] = self._counts.get(task, 0) + 1
            self._losses[task] = self._losses[task] + values[k] if task in self._losses else values[k]
            if present.names is not None:
                self._names[task] = present.names[k]

    def _check_names(self, caller: str, present: Present) -> None:
        """Raises if a name stands for another task than in the calls before."""
        places = {name: task for task, name in self._names.items()}
        for task, name in zip(present.tasks, present.names or (), strict=False):
            if self._names.get(task, name) != name or places.get(name, task) != task:
                raise ValueError(
                    f"{caller}: entry {task} is {name}, expected the entries in one order in all calls of a step: "
                    f"{', '.join(f'{k} is {known}' for k, known in sorted(self._names.items()))}"
                )

    def jacobian(self, loss_weights_later: bool = False) -> AccumulatedJacobian:
        """The Jacobian of the accumulated losses, for `mtlfast.backward`.

        Args:
            loss_weights_later: whether its `weigh` will be called.

        Raises:
            ValueError: no micro-batch was added.
            RuntimeError: a call of `add` failed in the middle.
        """
        self._refuse_part("backward")
        if not self._micro_batches:
            raise ValueError("backward: the accumulator is empty, expected at least one call of add() before")
        tasks = tuple(sorted(self._counts))
        counts = [self._counts[task] if self._reduction == "mean" else 1 for task in tasks]
        names = tuple(self._names.get(task, str(task)) for task in tasks) if self._names else None
        losses = [self._losses[task] / count for task, count in zip(tasks, counts, strict=True)]
        present = Present(self._number, tasks, names, [], [], [])
        return AccumulatedJacobian(self, present, self._collected, losses, counts, loss_weights_later)

    def _refuse_part(self, caller: str) -> None:
        if self._collected.in_part:
            raise RuntimeError(
                f"{caller}: an earlier call of {CLASS}.add failed in the middle, so that a part of its micro-batch is "
                "in the sums; expected reset() first"
            )

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The accumulated gradients, for a checkpoint between two micro-batches.

        Save it beside the state of the model. A step that goes on from it is bitwise that of an uninterrupted run.

        Args:
            model: a module with all parameters that the losses reach, whose names say where a gradient belongs.

        Returns:
            A dict of tensors, numbers and strings, which `torch.load(weights_only=True)` reads.

        Raises:
            ValueError: the losses reach a parameter that is not one of the model's.
            RuntimeError: a call of `add` failed in the middle.
        """
        self._refuse_part(f"{CLASS}.state_dict")
        return {
            "gradients": self._collected.by_name(f"{CLASS}.state_dict", dict(model.named_parameters())),
            "micro_batches": self._micro_batches,
            "number": self._number,
            "names": dict(self._names),
            "counts": dict(self._counts),
            "losses": dict(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Replaces the accumulated gradients by those of a checkpoint.

        Args:
            state: what `state_dict` returned.
            model: a module with the same parameters by name.

        Raises:
            ValueError: the state does not fit the model, or is none. The accumulated gradients stay then.
        """
        caller = f"{CLASS}.load_state_dict"
        for key in STATE:
            if not isinstance(state, Mapping) or key not in state:
                raise ValueError(f"{caller}: the state has no {key}, expected what state_dict() returned")
        collected = Collected(f"{CLASS}.add", self._shared, self._storage_dtype)
        collected.load(caller, state["gradients"], dict(model.named_parameters()))
        self.reset()
        self._collected = collected
        self._micro_batches, self._number = state["micro_batches"], state["number"]
        self._names, self._counts, self._losses = dict(state["names"]), dict(state["counts"]), dict(state["losses"])


class AccumulatedJacobian(StoredRows):
    """A Jacobian whose rows were accumulated by a `TaskGradientAccumulator`, which `obtain` empties.

    Args:
        accumulator: where they come from.
        present: the tasks that were in at least one micro-batch.
        collected: their gradients, summed.
        losses: their K losses.
        counts: what each task's gradients are divided by.
        loss_weights_later: whether `weigh` will be called.
    """

    way = "accumulated"

    def __init__(
        self,
        accumulator: TaskGradientAccumulator,
        present: Present,
        collected: Collected,
        losses: Sequence[Tensor],
        counts: list[int],
        loss_weights_later: bool = False,
    ) -> None:
        super().__init__(present, collected.shared(), collected.storage_dtype)
        self.losses = torch.stack([loss.to(self.device) for loss in losses])
        self._accumulator, self._collected, self._counts = accumulator, collected, counts
        self._loss_weights_later = loss_weights_later

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Takes the gradients out of the accumulator, and divides and weighs them."""
        self._accumulator.reset()
        divided = any(count > 1 for count in self._counts)
        self.take(self._collected, apart=divided or loss_weights is not None or self._loss_weights_later)
        if loss_weights is not None:
            self.weigh(loss_weights)
        if divided:
            self.scale(torch.tensor(self._counts, dtype=torch.float64).reciprocal().to(self.device))
