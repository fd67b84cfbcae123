"""The protocol that every aggregator keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from mtlfast import ops
from mtlfast._by_task import put, take
from mtlfast._exact_state import ExactState
from mtlfast.aggregation._jacobian import AsksJacobian, RowsJacobian
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step, check_loss_scale, check_tasks, plain_number, task_indices
from mtlfast.ops._precision import check_precision
from mtlfast.task_gradients import TaskGradients


class Aggregator(ExactState, ABC):
    """Task gradients in, one update direction out.

    A call in training mode is a step, and so is `mtlfast.backward` in either mode. A call after `.eval()` moves no
    state and draws no random number: random orders are ascending then, and random weights the expected ones.

    `aggregator(grads)` takes `TaskGradients` and returns T tensors; `aggregator(matrix)` takes a Jacobian [K, P] and
    returns a vector [P]. `losses` [K], `loss_scale` (a float or a tensor of one element by which the losses were
    multiplied) and `tasks` (the present tasks' indices; all tensors hold those only) are there for methods that read
    them; `precision` chooses the sums of the Gram matrix, as in `mtlfast.ops.gram`.

    A method that needs more than products of gradients is a subclass of this class with an `aggregate`; one whose
    direction is w(G)^T J is a `GramAggregator`.

    What a method remembers from step to step it keeps in a buffer `state`: a step that fails brings that back. `reset`
    must forget it, and a step that is not finite must leave it alone.

    Attributes:
        paper: who published it where, or "".
        keeps: what it remembers from step to step for n tasks, or "".
        reads: what of the gradients it looks at.
    """

    paper: ClassVar[str] = ""
    keeps: ClassVar[str] = ""
    reads = Reads.ROWS

    @classmethod
    def for_tasks(cls, num_tasks: int) -> Self:
        """One for so many tasks with settings to start from, as `mtlfast.methods` makes it.

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
    ) -> list[Tensor | None] | Tensor:
        """Aggregates; see the class."""
        if not isinstance(grads, TaskGradients | Tensor):
            raise TypeError(
                f"{type(self).__name__}: got a {type(grads).__name__}, expected TaskGradients "
                "(TaskGradients.from_rows makes them of lists of gradients) or a Jacobian matrix [K, P]"
            )
        rows = TaskGradients.from_matrix(grads) if isinstance(grads, Tensor) else grads
        present = task_indices(tasks)
        step = Step(
            rows.num_tasks, losses, plain_number(loss_scale), present, training=self.training, precision=precision
        )
        self.check(step, RowsJacobian(rows))
        directions = self.direction(rows, step)
        if not isinstance(grads, Tensor):
            return directions
        assert directions[0] is not None
        return directions[0]

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses what the method cannot work with, before the first backward pass and before any state moves.

        A method that refuses anything overrides it, calls this one and raises one sentence.

        Args:
            step: what is known before the gradients are.
            jacobian: how they will be had; None: only the Gram matrix is given.

        Raises:
            ValueError, TypeError: the method cannot work with them.
        """
        if step.tasks is not None:
            check_tasks(type(self).__name__, step.tasks, step.num_tasks)
        check_precision(type(self).__name__, step.precision)
        if step.loss_scale is not None:
            check_loss_scale(type(self).__name__, step.loss_scale)
        if jacobian is None:
            return
        if self.reads is Reads.CROSS_GRAM:
            raise TypeError(
                f"{type(self).__name__}: got one batch's gradients, expected a call of weights(J_1 J_2^T) with two "
                "batches'"
            )
        if self.reads is Reads.ROWS and jacobian.no_rows is not None:
            raise TypeError(f"{type(self).__name__}: it looks at the task gradients themselves, but {jacobian.no_rows}")

    @abstractmethod
    def aggregate(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> Sequence[Tensor | None] | None:
        """Writes the direction into `out`; or returns T tensors, which are then copied there.

        It is called with keywords.

        Args:
            grads: K tasks x T tensors; `grads.parameters`, where they are known, say whose.
            step: the losses and what else is known.
            out: T tensors of the gradients' shapes, dtype and layout, to be overwritten; None where no task reaches.
                Their memory is the direction's own.
        """

    def direction(self, grads: TaskGradients, step: Step) -> list[Tensor | None]:
        """The direction of checked arguments: T new tensors, None where no task reaches a tensor."""
        out = [None if example is None else torch.empty_like(example) for example in grads.examples()]
        returned = self.aggregate(grads, step=step, out=out)
        if returned is not None:
            self._copy(returned, out)
        return out

    def _copy(self, returned: Sequence[Tensor | None], out: Sequence[Tensor | None]) -> None:
        """What `aggregate` returned goes where it would have been written."""
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
        """Remembers the state; the function that it returns brings it back after a step that failed.

        That is what a buffer "state" and a generator hold, here and in inner methods: numbers for each task. A method
        that keeps more than that writes it last, when nothing can fail any more.
        """
        if not self._modules:
            return self._remember()
        undo = [module._remember() for module in self.modules() if isinstance(module, Aggregator)]

        def all_back() -> None:
            for back in undo:
                back()

        return all_back

    def _remember(self) -> Callable[[], None]:
        """`snapshot` of this module alone."""
        state = self._buffers.get("state")
        values = None if state is None else state.clone()

        def back() -> None:
            if "state" in self._buffers:
                self._buffers["state"] = state if state is None or values is None else state.copy_(values)

        return back

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

    # What the weights depend on: `solve` sees a Gram matrix of which no more than that is computed.
    reads = Reads.GRAM

    def weights(
        self,
        gram: Tensor,
        *,
        losses: Tensor | None = None,
        loss_scale: float | Tensor | None = None,
        tasks: Sequence[int] | None = None,
        rtol: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The tasks' weights.

        Args:
            gram: [..., K, K] float64, the Gram matrix; leading dimensions are groups.
            losses: [K], the losses' values, for methods that read them.
            loss_scale: what the losses were multiplied by, for methods with an absolute norm.
            tasks: indices of the K present tasks; None: all.
            rtol: relative precision of the gradients behind `gram`, for rank decisions; None: K * 1e-6.
            mask: [..., K] bool, which of the K tasks have a part in the direction; None: all. The others are left out
                as if they had not been given: their weights are 0, and their state stays as it is.

        Returns:
            [..., K] float64, on gram's device; NaN where `gram` is not finite.

        Raises:
            ValueError, TypeError: the method cannot work with these.
        """
        name = type(self).__name__
        if not isinstance(gram, Tensor):
            raise TypeError(f"{name}: gram is a {type(gram).__name__}, expected a Tensor [..., K, K] of float64")
        if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.dtype != torch.float64:
            raise ValueError(f"{name}: gram is {list(gram.shape)} {gram.dtype}, expected [..., K, K] torch.float64")
        step = Step(gram.shape[-1], losses, plain_number(loss_scale), task_indices(tasks), rtol, self.training, mask)
        self.check(step)
        return self._solved(gram, step)

    @abstractmethod
    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The weights [..., K] float64 of Gram matrices [..., K, K], for a step that `check` let pass.

        The weight of a task that `step.mask` leaves out is 0, and its row of `gram` may hold anything.
        """

    def _solved(self, gram: Tensor, step: Step) -> Tensor:
        """`solve`, and one sentence if that returned something else."""
        weights = self.solve(gram, step)
        if not isinstance(weights, Tensor):
            raise TypeError(f"{type(self).__name__}: solve returned a {type(weights).__name__}, expected a Tensor")
        if weights.shape != gram.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}: solve returned {list(weights.shape)}, expected {list(gram.shape[:-1])}"
            )
        return weights if weights.dtype is torch.float64 else weights.double()

    def diagnostics(self) -> dict[str, int]:
        """Counts of what went wrong since `reset()`, for methods that iterate; on a GPU this waits for it."""
        return {}

    def check_entries(self, buffer: str, what: str, step: Step) -> None:
        """Has a buffer [n] that the user gave an entry for each task?

        Raises:
            ValueError: there are more tasks than entries, or all are present and there are fewer.
        """
        known = len(getattr(self, buffer))
        if (step.tasks is None and known != step.num_tasks) or any(task >= known for task in step.present):
            raise ValueError(
                f"{type(self).__name__}: got tasks {list(step.present)}, expected {known} tasks as there are {what}"
            )

    def entries(self, buffer: str, gram: Tensor, step: Step) -> Tensor:
        """The present tasks' entries of a buffer [n] that the user gave, [..., K] on gram's device."""
        values: Tensor = getattr(self, buffer)
        if values.device != gram.device:  # once: a copy from the host waits
            values = values.to(gram.device)
            setattr(self, buffer, values)
        return take(values, step.present).expand(gram.shape[:-1]).clone()

    def weigh(self, jacobian: AsksJacobian, step: Step, need_gram: bool = False) -> tuple[Tensor, Tensor | None]:
        """The weights [K] of a Jacobian, and its Gram matrix if it was computed.

        A task that has no part in the direction has the weight 0, and the others' are those of a step without it.

        Args:
            jacobian: it is asked for no more than the method `reads`.
            step: `check` let it pass; what the Jacobian knows better is taken from there.
            need_gram: compute the Gram matrix in any case.
        """
        gram: Tensor | None = None
        precision = step.precision or self.reads.precision
        if self.reads.needs_gram or need_gram:
            read = gram = jacobian.gram(precision)
        elif self.reads is Reads.NORMS:
            read = jacobian.norms().square().diag()
        else:
            assert self.reads is Reads.NOTHING
            K = jacobian.num_tasks
            read = torch.empty(K, K, dtype=torch.float64, device=jacobian.device)
        places = jacobian.taking_part
        rtol, mask = jacobian.product_rtol(precision), jacobian.mask
        if places is None:
            return self._solved(read, step._replace(rtol=jacobian.num_tasks * rtol, mask=mask)), gram
        weights = read.new_zeros(jacobian.num_tasks)
        if places:
            some = step.among(places)._replace(
                rtol=len(places) * rtol, mask=None if mask is None else take(mask, places)
            )
            self.check(some)
            put(weights, places, self._solved(take(take(read, places).mT, places).mT.contiguous(), some))
        return weights, gram

    def aggregate(
        self, grads: TaskGradients, step: Step, out: list[Tensor | None] | None = None
    ) -> list[Tensor | None]:
        """One read for the Gram matrix or the norms, if they matter, one for the weighted sum."""
        weights, _ = self.weigh(RowsJacobian(grads), step)
        return ops.combine(grads, weights, out=out)

    def direction(self, grads: TaskGradients, step: Step) -> list[Tensor | None]:
        """The direction of checked arguments: T new tensors, None where no task reaches a tensor."""
        return self.aggregate(grads, step)
