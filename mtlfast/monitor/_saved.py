"""The state of a monitor, and the checks of a state that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mtlfast.monitor._history import Means
from mtlfast.monitor._names import shown_names
from mtlfast.monitor._rings import Rings

ENTRIES = ("window", "names", "groups", "steps", "rings", "history")


class Saved(NamedTuple):
    """What a monitor has seen."""

    window: int
    names: list[str | None]
    groups: tuple[str, ...] | None
    steps: int
    rings: Rings | None
    history: list[Means]

    def as_dict(self) -> dict[str, Any]:
        """Copies of it, as a dict of tensors, lists, numbers and strings."""
        means = Means.stacked(self.history, len(self.names))
        return {
            "window": self.window,
            "names": list(self.names),
            "groups": None if self.groups is None else list(self.groups),
            "steps": self.steps,
            "rings": None if self.rings is None else self.rings.each(Tensor.clone)._asdict(),
            "history": means._asdict(),
        }

    @classmethod
    def from_dict(cls, caller: str, state: Mapping[str, Any], window: int, names: tuple[str, ...] | None) -> Saved:
        """A copy of what was saved.

        Args:
            caller: what the error begins with.
            state: what `as_dict` returned.
            window: that of the monitor which is to have it.
            names: those of its tasks, if it was given any.

        Raises:
            ValueError: the state is none, or that of another window or of other tasks.
        """
        for entry in ENTRIES:
            if not isinstance(state, Mapping) or entry not in state:
                raise ValueError(f"{caller}: the state has no {entry}, expected what state_dict() returned")
        if state["window"] != window:
            raise ValueError(f"{caller}: the state is of a window of {state['window']} steps, expected {window}")
        saved = list(state["names"])
        if names is not None and saved and shown_names(saved) != names:
            raise ValueError(
                f"{caller}: the state is of the tasks {', '.join(shown_names(saved))}, expected {', '.join(names)}"
            )
        rings, groups = state["rings"], state["groups"]
        history = Means(**{name: x.clone() for name, x in state["history"].items()})
        return cls(
            window,
            saved or list(names or ()),
            None if groups is None else tuple(groups),
            int(state["steps"]),
            None if rings is None else Rings(**{name: x.clone() for name, x in rings.items()}),
            [Means(*row) for row in zip(*history, strict=True)],
        )
