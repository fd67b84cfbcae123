"""Gram aggregators whose weights one solver of `csrc/solve` computes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.aggregation._base import Aggregator
from mtlfast.aggregation._grouped_state import GroupedState
from mtlfast.aggregation._reads import Reads
from mtlfast.aggregation._step import Step


def grown(
    owner: Aggregator,
    old: Tensor | None,
    groups: tuple[int, ...],
    shape: tuple[int, ...],
    fill: float,
    device: torch.device,
) -> Tensor:
    """The state [*groups, *shape] on `device` with the entries of `old`, and `fill` elsewhere.

    It is `old` itself if that has the shape and the device already.

    Raises:
        ValueError: `old` has other groups.
    """
    if old is not None and old.shape[: -len(shape)] != groups:
        raise ValueError(
            f"{type(owner).__name__}: gram has groups {list(groups)}, expected {list(old.shape[: -len(shape)])} as the "
            "state has (reset() forgets it)"
        )
    if old is not None and old.shape == (*groups, *shape) and old.device == device:
        return old
    new = torch.full((*groups, *shape), fill, dtype=torch.float64, device=device)
    if old is not None:
        new[tuple(slice(size) for size in old.shape)] = old.to(device)
    return new


class SolvedAggregator(GroupedState):
    """An aggregator whose weights a solver of `csrc/solve` computes.

    A subclass names the solver, and says which numbers of a step are its params, inputs and state.
    """

    reads = Reads.EXACT_GRAM  # most decide about ranks, hulls or feasibility; a subclass says otherwise
    method: str
    state_fill = 0.0  # the initial state of a task
    counts: tuple[str, ...] = ()  # what the state's first numbers count, as `diagnostics` calls it

    def __init__(self) -> None:
        super().__init__()
        self._fits: tuple[object, ...] = (None,)  # a state, and the shapes of a call that it is known to fit

    @abstractmethod
    def params(self, step: Step) -> dict[str, float]:
        """The host constants that the solver takes, by their names in its header."""

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The device inputs that the solver takes, by their names in its header, [groups of gram, ...]."""
        return {}

    def state_shape(self, known: int) -> tuple[int, ...]:
        """The shape of one group's state for `known` tasks, or () if the method keeps no state."""
        return (len(self.counts),) if self.counts else ()

    def solve(self, gram: Tensor, step: Step) -> Tensor:
        """The weights that the solver finds."""
        return ops.solve(*self.solve_arguments(gram, step))

    def solve_arguments(
        self, gram: Tensor, step: Step
    ) -> tuple[Tensor, str, dict[str, float], dict[str, Tensor], Tensor | None, tuple[int, ...] | None, Tensor | None]:
        """The arguments for `ops.solve`, with random numbers drawn and the state grown to the step's tasks."""
        self.keep_groups(step)
        if not step.training:
            state = self._grown(gram, step)
            state = state.clone() if state is not None and state is self.state else state
            return gram, self.method, self.params(step), self.inputs(gram, step), state, step.tasks, step.mask
        # Read past nn.Module's attribute search: for a few tasks it takes as long as the solve.
        call = (self._buffers["state"], gram.shape, gram.device, step.tasks)
        if call[0] is not self._fits[0] or call[1:] != self._fits[1:]:
            self.state = self._grown(gram, step)
            self._fits = (self.state, *call[1:])
        return (
            gram,
            self.method,
            self.params(step),
            self.inputs(gram, step),
            self._buffers["state"],
            step.tasks,
            step.mask,
        )

    def _grown(self, gram: Tensor, step: Step) -> Tensor | None:
        """The state on gram's device, grown to the step's tasks; None if the method keeps none."""
        least = self.state_shape(0)
        if not least:
            return None
        known = max(step.present, default=-1) + 1
        if self.state is not None:
            known = max(known, self.state.shape[-len(least)] - least[0])
        return grown(self, self.state, gram.shape[:-2], self.state_shape(known), self.state_fill, gram.device)

    def diagnostics(self) -> dict[str, int]:
        """How many solves since `reset()` ended in a way that one may want to know of; on a GPU this waits for it.

        Returns:
            "unconverged": solves that gave up, or that had no solution; "decided_by_noise": solves that took something
            for zero since it is no larger than rounding, as a gradient that depends on the others or a combination that
            cancels. A method has those of the two that can happen to it.
        """
        if not self.counts or self.state is None:
            return dict.fromkeys(self.counts, 0)
        groups = self.state.shape[: -len(self.state_shape(0))].numel()
        totals = self.state.reshape(groups, -1)[:, : len(self.counts)].sum(dim=0)
        counted = totals.tolist()  # host: the user asks for numbers, between steps
        return {name: int(total) for name, total in zip(self.counts, counted, strict=True)}
