"""PCGrad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mtlfast._numbers import plain, shown
from mtlfast._settings import Choice, Whole
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._random_order import RandomOrder
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step, check_one_of_all


class PCGrad(RandomOrder, SolvedAggregator):
    """Removes from each task's gradient what conflicts with the other tasks' gradients, then sums the results.

    Each gradient is compared with the other tasks' original gradients one after another. Where the dot product is
    negative, the gradient loses its component along the other one. Yu et al., "Gradient Surgery for Multi-Task
    Learning" (NeurIPS 2020), Algorithm 1.

    With `protected` it is one-sided: the protected tasks keep their gradients, and every other gradient is compared
    with theirs alone. For two tasks, one of them protected, that is the projection of A-GEM (Chaudhry et al.,
    "Efficient Lifelong Learning with A-GEM", ICLR 2019).

    Args:
        reduction: "sum" as in the paper, or "mean", which divides the sum by the number of present tasks.
        order: in which order each gradient is compared with the others. "random" draws a uniformly random order for
            each gradient at each call; "fixed" is ascending.
        generator: the generator of the random orders, on the gradients' device. `state_dict()` saves its state. None:
            torch's global generator.
        protected: the indices of the tasks that are protected. The other gradients are compared with theirs in this
            order, so that none is drawn. A protected task that is absent is passed over. None: no task is protected,
            and all gradients lose their conflicts.

    Raises:
        ValueError: `reduction` or `order` is not one of these, or `protected` holds no index, or one twice. A call
            raises it if a protected task does not exist.

    Cost: two reads of K * P and one write of P; the solve takes K^3 operations. Scale-free: a factor common to all
    losses changes no weight.

    Example:
        The gradients (1, 0) and (-1, 1) conflict. They become (0.5, 0.5) and (0, 1), whose sum is the direction.

        >>> import torch
        >>> from mtlfast.aggregation import PCGrad
        >>> PCGrad()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """

    paper = "Yu et al., NeurIPS 2020"
    reads = Reads.GRAM
    method = "pcgrad"
    reduction = Choice("sum", "mean")
    turns: Tensor | None

    def __init__(
        self,
        reduction: Literal["sum", "mean"] = "sum",
        order: Literal["random", "fixed"] = "random",
        generator: torch.Generator | None = None,
        protected: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(order, generator)
        self.register_buffer("turns", None, persistent=False)
        self.reduction = reduction
        self.protected = protected

    @property
    def protected(self) -> tuple[int, ...] | None:
        """The protected tasks' indices; None if no task is protected."""
        return self._protected

    @protected.setter
    def protected(self, value: Sequence[int] | Tensor | None) -> None:
        self._protected = None if value is None else _different_indices(value)
        self.turns = None
        if self._protected is not None:
            self.turns = torch.full((max(self._protected) + 1,), -1.0, dtype=torch.float64)
            for turn, task in enumerate(self._protected):
                self.turns[task] = turn

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses a step of all tasks in which a protected one does not exist."""
        super().check(step, jacobian)
        if self._protected is not None:
            check_one_of_all("PCGrad", max(self._protected), step)

    def params(self, step: Step) -> dict[str, float]:
        """The reduction; and, as in the paper, that no gradient is compared with itself."""
        return {"mean": self.reduction == "mean", "itself": False}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The random order, or when each protected task's turn is: -1 for a task that is not protected."""
        turns = self._buffers["turns"]  # past nn.Module's attribute search, as in _solved.py
        if turns is None:
            return self.keys(gram, step)
        missing = max(step.present, default=-1) + 1 - len(turns)
        if missing > 0:
            self.turns = torch.nn.functional.pad(turns, (0, missing), value=-1.0)
        return {"turns": self.entries("turns", gram, step)}

    def extra_repr(self) -> str:
        """The settings; `protected` if a task is."""
        protected = "" if self._protected is None else f", protected={self._protected}"
        return f"reduction={self.reduction!r}, order={self.order!r}{protected}"


def _different_indices(value: Sequence[int] | Tensor) -> tuple[int, ...]:
    """The indices as Python integers."""
    try:
        indices = () if isinstance(value, dict | set | frozenset) else tuple(map(plain, value))
    except TypeError:  # a number
        indices = ()
    if not indices or not all(map(Whole(0).holds, indices)) or len(set(indices)) < len(indices):
        raise ValueError(f"PCGrad: protected is {shown(value)}, expected different indices of tasks, or None")
    return indices
