"""`GramAggregator`, the base class of all methods whose weights follow from the Gram matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast._by_task import put, take
from mtlfast._loss_scale import plain_number
from mtlfast.aggregation._base import Aggregator
from mtlfast.aggregation._jacobian import AsksJacobian, RowsJacobian
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step, task_indices
from mtlfast.task_gradients import TaskGradients


class GramAggregator(Aggregator):
    """An aggregator whose direction is a weighted sum of the task gradients, w(G)^T J, with weights from G = J J^T.

    A subclass implements `solve`.
    """

    # What the weights depend on. Entries of the Gram matrix that a method does not read are not computed.
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
            gram: [..., K, K] float64, the Gram matrix. The leading dimensions are groups, each weighted by itself.
            losses: [K], the losses' values, for methods that read them.
            loss_scale: the factor by which the losses were multiplied, for methods whose weights depend on the size of
                the gradients. None: 1.
            tasks: the indices of the K present tasks. None: 0 to K - 1.
            rtol: the relative precision of the gradients behind `gram`, which decides about ranks. None: K * 1e-6.
            mask: [..., K] bool. A task whose entry is False is left out as if it had not been given: its weight is 0,
                and its state stays as it is. None: all tasks take part.

        Returns:
            [..., K] float64 on gram's device; NaN where `gram` is not finite.

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
        """The weights [..., K] float64 for Gram matrices [..., K, K], in a step that `check` let pass.

        A task that `step.mask` leaves out must get the weight 0, whatever its row of `gram` holds.
        """

    def _solved(self, gram: Tensor, step: Step) -> Tensor:
        """Calls `solve`, and raises unless that returned weights."""
        weights = self.solve(gram, step)
        if not isinstance(weights, Tensor):
            raise TypeError(f"{type(self).__name__}: solve returned a {type(weights).__name__}, expected a Tensor")
        if weights.shape != gram.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}: solve returned {list(weights.shape)}, expected {list(gram.shape[:-1])}"
            )
        return weights if weights.dtype is torch.float64 else weights.double()

    def diagnostics(self) -> dict[str, int]:
        """Counts, by name, of solves since `reset()` that one may want to know of. On a GPU it waits for the device."""
        return {}

    def entries(self, buffer: str, gram: Tensor, step: Step) -> Tensor:
        """The present tasks' entries of a buffer [n], which the user gave: [..., K] on gram's device."""
        values: Tensor = getattr(self, buffer)
        if values.device != gram.device:  # only once, because a copy from the host waits
            values = values.to(gram.device)
            setattr(self, buffer, values)
        return take(values, step.present).expand(gram.shape[:-1]).clone()

    def weigh(self, jacobian: AsksJacobian, step: Step, need_gram: bool = False) -> tuple[Tensor, Tensor | None]:
        """The weights [K] for a Jacobian, and its Gram matrix if it was computed.

        A task that is left out of the direction gets the weight 0. The others get the weights of a step without it.

        Args:
            jacobian: the source of the Gram matrix or the norms, of which only what the method `reads` is computed.
            step: a step that `check` let pass. Its `rtol` and `mask` are replaced by the Jacobian's.
            need_gram: compute the Gram matrix in any case.
        """
        precision = step.precision or self.reads.precision
        gram = jacobian.gram(precision) if self.reads.needs_gram or need_gram else None
        if self.reads is Reads.CROSS_GRAM:
            assert jacobian.cross_gram is not None
            read = jacobian.cross_gram(precision)
        elif gram is not None:
            read = gram
        elif self.reads is Reads.NORMS:
            read = jacobian.norms().square().diag_embed()
        else:
            assert self.reads is Reads.NOTHING
            groups = () if step.groups is None else (len(step.groups.names),)
            shape = (*groups, jacobian.num_tasks, jacobian.num_tasks)
            read = torch.empty(shape, dtype=torch.float64, device=jacobian.device)
        places = jacobian.taking_part
        rtol, mask = jacobian.product_rtol(precision), jacobian.mask
        if places is None:
            return self._solved(read, step._replace(rtol=jacobian.num_tasks * rtol, mask=mask)), gram
        weights = read.new_zeros(jacobian.num_tasks)
        if places:
            some = step._replace(mask=mask).among(places)._replace(rtol=len(places) * rtol)
            self.check(some)
            put(weights, places, self._solved(take(take(read, places).mT, places).mT.contiguous(), some))
        return weights, gram

    def aggregate(
        self, grads: TaskGradients, step: Step, out: list[Tensor | None] | None = None
    ) -> list[Tensor | None]:
        """Reads the gradients once for the Gram matrix or the norms, if the weights need them, and once for the sum."""
        weights, _ = self.weigh(RowsJacobian(grads, step.groups), step)
        return ops.combine(grads, weights, out=out, groups=None if step.groups is None else step.groups.of_column)

    def direction(self, grads: TaskGradients, step: Step) -> list[Tensor | None]:
        """The direction for arguments that `check` let pass: T new tensors, None for a tensor that no task reaches."""
        return self.aggregate(grads, step)
