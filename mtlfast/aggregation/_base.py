"""`Aggregator`, the base class of all methods that make a direction of task gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast._exact_state import ExactState
from mtlfast._loss_scale import check_loss_scale, plain_number
from mtlfast.aggregation._groups import Groups
from mtlfast.aggregation._jacobian import AsksJacobian, RowsJacobian, do_nothing
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step, check_tasks, task_indices
from mtlfast.ops._check import is_index
from mtlfast.ops._precision import check_precision
from mtlfast.task_gradients import TaskGradients


class Aggregator(ExactState, ABC):
    """A method that makes one update direction of the task gradients.

    `aggregator(grads)` takes `TaskGradients` and returns T tensors. `aggregator(matrix)` takes a Jacobian [K, P] and
    returns a vector [P]. `mtlfast.backward` computes the gradients as well and writes the direction to `.grad`.

    A call in training mode is a training step, and so is `mtlfast.backward` in either mode. A call after `.eval()`
    changes no state and draws no random number: a random order is ascending then, and random weights are the expected
    ones.

    To add a method, subclass `GramAggregator` if its direction is w(G)^T J with weights w that follow from the Gram
    matrix G, and implement `solve`. Otherwise subclass this class and implement `aggregate`. What the method remembers
    from step to step belongs in a buffer named `state`, which a failed step restores. `reset` must clear it, and a step
    that is not finite must leave it alone.

    Attributes:
        paper: where the method was published, or "".
        keeps: what the method remembers from step to step for n tasks, or "".
        reads: what the method looks at of the task gradients.
        by_element: whether a method that reads the gradients themselves works on any part of their elements as on all,
            but for sums that `TaskGradients.total` completes. Ranks then share the elements out among themselves.
    """

    paper: ClassVar[str] = ""
    keeps: ClassVar[str] = ""
    reads = Reads.ROWS
    by_element: ClassVar[bool] = False

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """An aggregator for so many tasks with settings to start from; `mtlfast.methods` calls it.

        A method whose constructor cannot be called without arguments overrides it.
        """
        return cls()

    def forward(
        self,
        grads: TaskGradients | Tensor,
        *,
        losses: Tensor | None = None,
        loss_scale: float | Tensor | None = None,
        tasks: Sequence[int] | None = None,
        precision: str | None = None,
        groups: Sequence[int | str] | None = None,
    ) -> list[Tensor | None] | Tensor:
        """The update direction.

        Args:
            grads: the task gradients, or a Jacobian matrix [K, P].
            losses: [K] the losses' values, for methods that read them.
            loss_scale: the factor by which the losses were multiplied, a float or a tensor of one element, for methods
                whose weights depend on the size of the gradients. None: 1.
            tasks: the K tasks' indices among all tasks, if some are absent. None: 0 to K - 1.
            precision: how the Gram matrix is summed, as in `mtlfast.ops.gram`. None: as exactly as the method needs.
            groups: for each of the T tensors the number or the name of its group, where each group gets weights of its
                own, or "tensor" for one group a tensor. None: one surgery for all.

        Returns:
            T tensors with None for a tensor that no task reaches, or a vector [P] for a matrix.

        Raises:
            ValueError, TypeError: the method cannot work with these.
        """
        if not isinstance(grads, TaskGradients | Tensor):
            raise TypeError(
                f"{type(self).__name__}: got a {type(grads).__name__}, expected TaskGradients "
                "(TaskGradients.from_rows makes them of lists of gradients) or a Jacobian matrix [K, P]"
            )
        rows = TaskGradients.from_matrix(grads) if isinstance(grads, Tensor) else grads
        present = task_indices(tasks)
        step = Step(
            rows.num_tasks,
            losses,
            plain_number(loss_scale),
            present,
            training=self.training,
            precision=precision,
            groups=_groups_of_tensors(type(self).__name__, groups, len(rows.shapes)),
        )
        self.check(step, RowsJacobian(rows, step.groups))
        directions = self.direction(rows, step)
        if not isinstance(grads, Tensor):
            return directions
        assert directions[0] is not None
        return directions[0]

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if the method cannot work with the step. It runs before the first backward pass and any state change.

        A method that has conditions of its own overrides it, calls this one first, and raises an error of one sentence.

        Args:
            step: what is known before the gradients are.
            jacobian: where the gradients will come from; None if only the Gram matrix is given.

        Raises:
            ValueError, TypeError: the method cannot work with these.
        """
        if step.tasks is not None:
            check_tasks(type(self).__name__, step.tasks, step.num_tasks)
        check_precision(type(self).__name__, step.precision)
        if step.loss_scale is not None:
            check_loss_scale(type(self).__name__, step.loss_scale)
        if jacobian is None:
            return
        if step.groups is not None and self.reads in (Reads.ROWS, Reads.STATE):
            why = "works element by element" if self.reads is Reads.ROWS else "keeps state for each parameter"
            raise TypeError(f"{type(self).__name__}: got groups, expected none, because the method {why}")
        if self.reads is Reads.CROSS_GRAM and jacobian.cross_gram is None:
            raise TypeError(
                f"{type(self).__name__}: got the gradients of one batch, expected those of two, as in "
                "mtlfast.backward(losses, ..., second=other_losses) or weights(J_1 @ J_2.T)"
            )
        if jacobian.cross_gram is not None and self.reads is not Reads.CROSS_GRAM:
            raise TypeError(
                f"{type(self).__name__}: got second=, expected the losses of one batch, because the method reads no "
                "products of two batches"
            )
        if self.reads in (Reads.ROWS, Reads.STATE) and jacobian.no_rows is not None:
            raise TypeError(f"{type(self).__name__}: needs the task gradients themselves, but {jacobian.no_rows}")
        if self.reads is Reads.STATE and jacobian.no_state is not None:
            raise TypeError(f"{type(self).__name__}: keeps state for each parameter, but {jacobian.no_state}")

    def check_entries(self, buffer: str, what: str, step: Step) -> None:
        """Raises unless a buffer [n], which the user gave, has an entry for each task.

        Raises:
            ValueError: a task has no entry, or all tasks are present and there are more entries than tasks.
        """
        known = len(getattr(self, buffer))
        if (step.tasks is None and known != step.num_tasks) or any(task >= known for task in step.present):
            raise ValueError(
                f"{type(self).__name__}: got tasks {list(step.present)}, expected {known} tasks as there are {what}"
            )

    @abstractmethod
    def aggregate(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> Sequence[Tensor | None] | None:
        """Writes the direction into `out`, or returns it as T tensors, which the caller then copies into `out`.

        The arguments are passed by keyword.

        Args:
            grads: K tasks x T tensors. `grads.parameters` are the parameters, if they are known.
            step: the losses and what else is known about the step.
            out: T tensors with the gradients' shapes, dtype and layout, in memory of their own; None for a tensor that
                no task reaches.
        """

    def prepare(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> Callable[[], None]:
        """Does all that can fail, and returns a function that writes the direction into `out`, which cannot fail.

        `mtlfast.backward` calls that function when all memory of the step is allocated. A method that keeps state for
        each parameter overrides this one in place of `aggregate`, and changes that state in the function that it
        returns. The default calls `aggregate` at once.
        """
        returned = self.aggregate(grads, step=step, out=out)
        if returned is not None:
            self._copy(returned, out)
        return do_nothing

    def direction(self, grads: TaskGradients, step: Step) -> list[Tensor | None]:
        """The direction for arguments that `check` let pass: T new tensors, None for a tensor that no task reaches."""
        grads, step = self.among_taking_part(RowsJacobian(grads), step)
        out = self.targets(grads)
        self.prepare(grads, step, out)()
        return out

    def among_taking_part(self, jacobian: AsksJacobian, step: Step) -> tuple[TaskGradients, Step]:
        """The rows and the step of those tasks alone that take part in the direction, as far as the host knows them.

        Raises:
            ValueError, TypeError: the method cannot work with these tasks.
        """
        grads, places = jacobian.rows(), jacobian.taking_part
        if places is None or not places:
            return grads, step
        step = step.among(places)
        self.check(step)
        return grads.with_rows([grads.rows[place] for place in places]), step

    @staticmethod
    def targets(grads: TaskGradients) -> list[Tensor | None]:
        """T new tensors for a direction, with the layout of the gradients; None for a tensor that no task reaches."""
        return [None if example is None else torch.empty_like(example) for example in grads.examples()]

    def _copy(self, returned: Sequence[Tensor | None], out: Sequence[Tensor | None]) -> None:
        """Copies what `aggregate` returned into `out`."""
        name = type(self).__name__
        if not isinstance(returned, Sequence):
            raise TypeError(
                f"{name}: aggregate returned a {type(returned).__name__}, expected a list of tensors or None"
            )
        if len(returned) != len(out):
            raise ValueError(f"{name}: aggregate returned {len(returned)} tensors, expected {len(out)}")
        for t, (given, target) in enumerate(zip(returned, out, strict=True)):
            if target is None:
                continue
            if given is None or given.shape != target.shape:
                got = "None" if given is None else f"shape {list(given.shape)}"
                raise ValueError(f"{name}: aggregate returned {got} for tensor {t}, expected {list(target.shape)}")
            target.copy_(given)

    def reset(self) -> None:
        """Forgets all state, as if new."""

    def snapshot(self) -> Callable[[], None]:
        """Copies the state, and returns a function that restores it after a failed step.

        The state is the buffer "state" and the generator, here and in inner aggregators: some numbers for each task. A
        method that keeps anything else must write it last, when nothing can fail any more.
        """
        if not self._modules:
            return self._remember()
        undo = [module._remember() for module in self.modules() if isinstance(module, Aggregator)]

        def all_back() -> None:
            for back in undo:
                back()

        return all_back

    def _remember(self) -> Callable[[], None]:
        """Does what `snapshot` does, for this module without inner ones."""
        state, groups = self._buffers.get("state"), self._buffers.get("state_groups")
        values = None if state is None else state.clone()

        def back() -> None:
            if "state_groups" in self._buffers:
                self._buffers["state_groups"] = groups
            if "state" in self._buffers:
                self._buffers["state"] = state if state is None or values is None else state.copy_(values)

        return back

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The saved state may be larger or smaller than the one here, and either may not exist yet.
        for name, buffer in self._buffers.items():
            if (saved := state_dict.get(prefix + name)) is not None:
                device = saved.device if buffer is None else buffer.device
                self._buffers[name] = torch.empty_like(saved, device=device)
            elif name in ("state", "state_groups"):
                self._buffers[name] = None
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _groups_of_tensors(name: str, groups: Sequence[int | str] | None, num_tensors: int) -> Groups | None:
    """The groups of T tensors, from what a call of an aggregator takes.

    Raises:
        ValueError, TypeError: there is not a number or a name for each tensor.
    """
    if groups is None:
        return None
    if not isinstance(groups, Sequence):
        raise TypeError(
            f'{name}: groups is a {type(groups).__name__}, expected "tensor" or a list with an entry for each of '
            f"{num_tensors} tensors"
        )
    if groups == "tensor":
        groups = range(num_tensors)
    if isinstance(groups, str) or len(groups) != num_tensors:
        raise ValueError(
            f'{name}: groups is {groups!r}, expected "tensor" or an entry for each of {num_tensors} tensors'
        )
    for t, group in enumerate(groups):
        if not isinstance(group, str) and not is_index(group):
            raise TypeError(f"{name}: groups has {group!r} for tensor {t}, expected the number or the name of a group")
    return Groups.by_name([str(group) for group in groups])
