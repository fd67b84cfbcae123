"""PCD: priority-constrained descent."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlfast._numbers import plain
from mtlfast._settings import Real
from mtlfast._vectors import Vector, vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.aggregation._step import Step


class PCD(SolvedAggregator):
    """Follows the first task's gradient as closely as the other tasks' progress allows.

    A step along its own normalised gradient would give another task a certain progress; the update gives it at least
    the share `tau` of that. The update has the length of the first task's gradient. It is that gradient itself if the
    other tasks' demands contradict each other. If task 0 is absent, the first present task takes its place. "Not All
    Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective Optimization" (TMLR 2026,
    arXiv 2606.29521).

    Args:
        tau: the share, 0 to 1, or a vector [n - 1] (a tensor, an array or a list) with a share for each task but the
            first.
        beta: the decay of the running mean of the squared norms, by which gradients are normalised, 0 to 1.
        eps: is added to that running mean before its inverse square root, relative to its mean over the tasks.

    Raises:
        ValueError: an argument is outside of its range, or `tau` does not have one dimension.

    State: 2 (n + 1) float64 numbers for each group. Cost: two reads of K * P and one write of P; the solve takes about
    K^3 operations. Scale-free.
    """

    paper = "TMLR 2026, arXiv 2606.29521"
    keeps = "n running norms"
    method = "pcd"
    counts = ("unconverged", "decided_by_noise")
    beta = Real(0, 1, most_itself=False)
    eps = Real(0)
    shares: Tensor | None

    def __init__(self, tau: float | Vector = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.register_buffer("shares", None)
        self.tau = tau
        self.beta = beta
        self.eps = eps

    @property
    def tau(self) -> float | Tensor:
        """The share, or the shares [n - 1]."""
        return self._share if self.shares is None else self.shares[1:]

    @tau.setter
    def tau(self, value: float | Vector) -> None:
        share = plain(value)
        if isinstance(share, int | float | str):
            if not Real(0, 1).holds(share):
                raise ValueError(f"PCD: tau is {share!r}, expected a number in [0, 1]")
            self._share, self.shares = float(share), None
            return
        if isinstance(value, Tensor) and value.dim() != 1:
            raise ValueError(f"PCD: tau has shape {list(value.shape)}, expected a number or [K - 1]")
        shares = vector(self, "tau", value, size="K - 1")
        if not bool((shares.clamp(0, 1) == shares).all()):  # host: once, when it is given
            raise ValueError(f"PCD: tau is {value!r}, expected numbers in [0, 1]")
        # The first task has no share, so its entry is not used. If it is absent, the next task takes its place, and
        # then the share of that task is not used.
        self._share, self.shares = 0.0, torch.cat([shares.new_zeros(1), shares])

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if the tasks are not those that have shares."""
        super().check(step, jacobian)
        if self.shares is not None:
            self.check_entries("shares", "shares", step)

    def params(self, step: Step) -> dict[str, float]:
        """The constants of the running mean, the share, and the gradients' precision."""
        return {"beta": self.beta, "eps": self.eps, "tau": self._share, "rtol": step.rank_rtol}

    def inputs(self, gram: Tensor, step: Step) -> dict[str, Tensor]:
        return {} if self.shares is None else {"shares": self.entries("shares", gram, step)}

    def state_shape(self, known: int) -> tuple[int, ...]:
        """A row of two counts (see `diagnostics`); each task's row: running mean, number of steps."""
        return (known + 1, 2)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, beta={self.beta}, eps={self.eps}"
