"""`GroupedState`: state that a Gram aggregator keeps for each group of parameters, by the group's name."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast.aggregation._gram_aggregator import GramAggregator
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._step import Step


class GroupedState(GramAggregator):
    """An aggregator with a buffer `state` [..., S], whose leading dimension are the groups of a step with groups.

    The groups' names are kept and saved beside the state. A step may have the same groups in another order.
    """

    state: Tensor | None
    state_groups: Tensor | None  # the names as text, since a state dict holds tensors alone

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", None)
        self.register_buffer("state_groups", None)
        self._decoded: tuple[Tensor | None, tuple[str, ...] | None] = (None, None)

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if a method cannot work with the step, or if the state is that of other groups."""
        super().check(step, jacobian)
        if jacobian is None or self._buffers["state"] is None or not self.keeps:
            return
        wanted, known = None if step.groups is None else step.groups.names, self._known_groups()
        if wanted == known:
            return
        if wanted is None or known is None:
            got, expected = ("no groups", "groups") if wanted is None else ("groups", "none")
            differs = f"got {got}, expected {expected}"
        elif new := sorted(set(wanted) - set(known)):
            differs = f"got a group {new[0]}, expected those"
        elif gone := sorted(set(known) - set(wanted)):
            differs = f"got no group {gone[0]}, expected those"
        else:
            return
        raise ValueError(f"{type(self).__name__}: {differs} as the state has (reset() forgets it)")

    def keep_groups(self, step: Step) -> None:
        """Brings the state into the order of the step's groups, and keeps their names.

        What is no memory of the method, such as counts of its solves, is forgotten where the groups change.
        """
        wanted, known = None if step.groups is None else step.groups.names, self._known_groups()
        if wanted == known or (wanted is None and self.keeps):
            return
        state = self._buffers["state"]
        if not self.keeps:
            self.state = None
        elif state is not None and wanted is not None and known is not None:
            self.state = state[torch.tensor([known.index(name) for name in wanted]).to(state.device)]
        text = None if wanted is None else torch.tensor(list("\0".join(wanted).encode()), dtype=torch.uint8)
        self.state_groups = text
        self._decoded = (text, wanted)

    def _known_groups(self) -> tuple[str, ...] | None:
        """The names of the state's groups."""
        text = self._buffers["state_groups"]
        if text is not self._decoded[0]:  # loaded, moved or restored
            names = None
            if text is not None:
                names = tuple(bytes(text.tolist()).decode().split("\0"))  # host: once, not in the steps after it
            self._decoded = (text, names)
        return self._decoded[1]

    def reset(self) -> None:
        """Forgets the state, as if new."""
        self.state = self.state_groups = None
