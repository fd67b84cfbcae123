"""What methods with a preference vector share."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class Preferring(SolvedAggregator):
    """A method that is told how much each task counts; without it 1/K each."""

    preferences: Tensor | None
    positive_preferences: ClassVar[bool] = False  # is a task that counts nothing, or less, refused?

    def __init__(self, pref_vector: Tensor | None) -> None:
        """Takes the preferences [n], one for each task, any real dtype."""
        super().__init__()
        self.register_buffer("preferences", None)
        self.pref_vector = pref_vector

    @property
    def pref_vector(self) -> Tensor | None:
        """The preferences, float64, or None."""
        return self.preferences

    @pref_vector.setter
    def pref_vector(self, value: Tensor | None) -> None:
        if value is not None and value.dim() != 1:
            raise ValueError(f"{type(self).__name__}: pref_vector has shape {list(value.shape)}, expected [K]")
        if self.positive_preferences and value is not None and not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"{type(self).__name__}: pref_vector is {value.tolist()}, expected positive numbers")
        self.preferences = None if value is None else value.detach().double().clone()

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The present tasks' preferences, if there are any."""
        others = super().inputs(gram, step)
        if self._buffers["preferences"] is None:  # past nn.Module's attribute search, as in _solved.py
            return others
        return {**others, "preferences": self.entries("preferences", gram, step)}

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses another number of tasks than there are preferences."""
        super().check(step, jacobian)
        if self._buffers["preferences"] is not None:
            self.check_entries("preferences", "preferences", step)
