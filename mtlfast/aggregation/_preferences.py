"""The base class of methods with a preference vector."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from mtlfast._vectors import Vector, vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class HasPreferences(SolvedAggregator):
    """A method whose user may say how much each task counts. Without that each task counts 1/K."""

    preferences: Tensor | None
    least_preference: ClassVar[tuple[float, bool]] = (-math.inf, True)  # the lower bound, and whether it is allowed

    def __init__(self, pref_vector: Vector | None) -> None:
        """`pref_vector` holds the preferences [n], one for each task: a tensor, an array or a list of numbers."""
        super().__init__()
        self.register_buffer("preferences", None)
        self.pref_vector = pref_vector

    @property
    def pref_vector(self) -> Tensor | None:
        """The preferences [n], float64; None if the user gave none."""
        return self.preferences

    @pref_vector.setter
    def pref_vector(self, value: Vector | None) -> None:
        least, itself = self.least_preference
        self.preferences = (
            None if value is None else vector(self, "pref_vector", value, size="K", least=least, least_itself=itself)
        )

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The base class's inputs; and the present tasks' preferences, if the user gave some."""
        others = super().inputs(gram, step)
        if self._buffers["preferences"] is None:  # past nn.Module's attribute search, as in _solved.py
            return others
        return {**others, "preferences": self.entries("preferences", gram, step)}

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses a step whose tasks are not those that have preferences."""
        super().check(step, jacobian)
        if self._buffers["preferences"] is not None:
            self.check_entries("preferences", "preferences", step)
