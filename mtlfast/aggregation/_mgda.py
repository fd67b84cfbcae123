"""MGDA."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtlfast._numbers import plain
from mtlfast._settings import Choice, Or, Real, Whole
from mtlfast._vectors import Vector, vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step

NORMS = ("none", "l2", "loss", "loss+")
ROUNDING = 1e-6  # by which float32 numbers that add up to 1 may miss it


class MGDA(SolvedAggregator):
    """The shortest convex combination of the gradients: a direction that improves every task equally fast.

    The weights w are the point of the simplex with the least w^T G w. Desideri, "Multiple-gradient descent algorithm"
    (2012); Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS 2018). They are found
    exactly. The papers and other implementations stop Frank-Wolfe's algorithm early, which `epsilon` reproduces.

    Args:
        epsilon: None finds the optimum. A number runs Frank-Wolfe's algorithm from uniform weights, until the size of a
            step is below it.
        max_iters: the most steps that Frank-Wolfe's algorithm makes.
        norms: what each gradient is divided by while the weights are computed: "none", "l2" (its norm), "loss" (its
            loss) or "loss+" (both). The weights then apply to the gradients as they are.
        min_weights: the least weight of every task, or [n] (a tensor, an array or a list) that of each, at least 0 and
            at most 1 together. The weights are then the best of those that are no smaller. None: 0. Lin et al., "A
            Pareto-Efficient Algorithm for Multiple Objective Optimization in E-Commerce Recommendation" (RecSys 2019),
            whose problem public code solves approximately.

    Raises:
        ValueError: an argument is not one of these. A call raises it if `norms` needs losses and there are none, if the
            least weights of its tasks add up to more than 1, or if they are not those of its tasks.

    Cost: two reads of K * P and one write of P; the solve takes about K^3 operations. Scale-free.
    """

    paper = "Sener and Koltun, NeurIPS 2018"
    method = "mgda"
    counts = ("unconverged",)
    epsilon = Or(Real(0, least_itself=False), None)
    max_iters = Whole(1)
    norms = Choice(*NORMS)
    least: Tensor | None

    def __init__(
        self,
        epsilon: float | None = None,
        max_iters: int = 100,
        norms: Literal["none", "l2", "loss", "loss+"] = "none",
        min_weights: float | Vector | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("least", None)
        self.epsilon = epsilon
        self.max_iters = max_iters
        self.norms = norms
        self.min_weights = min_weights

    @property
    def min_weights(self) -> float | Tensor | None:
        """The least weight of every task, or the tasks' least weights [n]; None if there are none."""
        return self._least_of_all if self.least is None else self.least

    @min_weights.setter
    def min_weights(self, value: float | Vector | None) -> None:
        number = plain(value)
        if number is None or isinstance(number, int | float | str):
            if number is not None and not Real(0, 1).holds(number):
                raise ValueError(f"MGDA: min_weights is {number!r}, expected a number in [0, 1]")
            self._least_of_all, self.least = None if number is None else float(number), None
            return
        if isinstance(value, Tensor) and value.dim() != 1:
            raise ValueError(f"MGDA: min_weights has shape {list(value.shape)}, expected a number or [K]")
        least = vector(self, "min_weights", value, size="K", least=0)
        total = float(least.sum())  # host: once, when it is given
        if total > 1 + ROUNDING:
            raise ValueError(f"MGDA: min_weights add up to {total:g}, expected at most 1")
        self._least_of_all, self.least = None, least

    def params(self, step: Step) -> dict[str, float]:
        """The end of Frank-Wolfe's algorithm, and what to divide by: 1 for norms plus 2 for losses."""
        return {"epsilon": self.epsilon or 0.0, "max_iters": self.max_iters, "norms": NORMS.index(self.norms)}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        """The losses, if the gradients are divided by them; the least weights, if there are some."""
        inputs = {}
        if self.norms not in ("none", "l2"):
            assert step.losses is not None
            inputs["losses"] = step.losses.detach().expand(gram.shape[:-1])
        if self._buffers["least"] is not None:  # past nn.Module's attribute search, as in _solved.py
            inputs["min_weights"] = self.entries("least", gram, step)
        elif self._least_of_all is not None:
            inputs["min_weights"] = torch.full(
                gram.shape[:-1], self._least_of_all, dtype=torch.float64, device=gram.device
            )
        return inputs

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses a step without losses if the gradients are divided by them, or without a least weight for a task."""
        super().check(step, jacobian)
        if self._buffers["least"] is not None:
            self.check_entries("least", "least weights", step)
        elif self._least_of_all is not None and self._least_of_all * step.num_tasks > 1 + ROUNDING:
            raise ValueError(
                f"MGDA: min_weights is {self._least_of_all:g} for each of {step.num_tasks} tasks, expected at most 1 "
                "together"
            )
        if step.losses is None and self.norms not in ("none", "l2"):
            raise ValueError(f"MGDA: norms is {self.norms!r} and losses is None, expected the tasks' losses")

    def extra_repr(self) -> str:
        """The settings; `min_weights` if there are some."""
        least = "" if self.min_weights is None else f", min_weights={self.min_weights}"
        return f"epsilon={self.epsilon}, max_iters={self.max_iters}, norms={self.norms!r}{least}"
