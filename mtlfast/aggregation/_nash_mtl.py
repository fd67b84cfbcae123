"""Nash-MTL."""

from __future__ import annotations

from mtlfast._settings import Or, Real, Whole
from mtlfast._vectors import Vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._loss_scale import NeedsLossScale
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step


class NashMTL(HasPreferences, NeedsLossScale):
    """The bargaining solution: the update that no task could gain from without another losing more, relatively.

    The weights w > 0 with (G w)_i = 1 / w_i. Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022),
    Algorithm 1; the system is solved exactly (residual up to 1e-10), where the paper and peers stop a sequence of
    convex programs at 1e-3. The update's length is sqrt(K), whatever the gradients' lengths. Where a combination of the
    gradients is zero up to `rtol`, there are no such weights: then they are MGDA's, whose update is zero there, and
    `diagnostics()` counts it.

    Args:
        n_tasks: the state is made for so many tasks at once; None: it grows with the tasks that come.
        max_norm: a longer update is shortened to this; 0: none is. With `loss_scale` the update is what it would be
            without that factor, times the factor.
        update_weights_every: new weights every so many steps; in between the last ones, shortened anew.
        pref_vector: [n], positive, the tasks' bargaining powers p: then (G w)_i = c_i / w_i, with c = K p / sum p over
            the present tasks (Kalai, "Nonsymmetric Nash Solutions and Replications of 2-Person Bargaining", 1977).
            None: all the same.

    Raises:
        ValueError: an argument is outside of its range, or `pref_vector` has not one dimension; at a call, there are
        more tasks than `n_tasks`, or other tasks than there are preferences.

    State: n + 3 float64 numbers a group. Cost: two reads of K * P, one write of P; about 3 K^3 for the solve.
    """

    paper = "Navon et al., ICML 2022"
    keeps = "n weights"
    method = "nash_mtl"
    counts = ("unconverged", "decided_by_noise")
    positive_preferences = True
    n_tasks = Or(Whole(1), None)
    max_norm = Real(0)
    update_weights_every = Whole(1)

    def __init__(
        self,
        n_tasks: int | None = None,
        max_norm: float = 1.0,
        update_weights_every: int = 1,
        pref_vector: Vector | None = None,
    ) -> None:
        super().__init__(pref_vector)
        self.n_tasks = n_tasks
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Refuses more tasks than `n_tasks`."""
        super().check(step, jacobian)
        known = max(step.present, default=-1) + 1
        if self.n_tasks is not None and known > self.n_tasks:
            raise ValueError(f"NashMTL: got {known} tasks, expected at most {self.n_tasks} as n_tasks says")

    def params(self, step: Step) -> dict[str, float]:
        """The norm, the steps, and what counts as zero."""
        every = self.update_weights_every
        return {"max_norm": self.max_norm, "update_weights_every": every, "rtol": step.rank_rtol}

    def state_shape(self, known: int) -> tuple[int, ...]:
        """Two counts, steps, then each task's last weight."""
        return (3 + (known if self.n_tasks is None else self.n_tasks),)

    def extra_repr(self) -> str:
        return (
            f"n_tasks={self.n_tasks}, max_norm={self.max_norm}, update_weights_every={self.update_weights_every}, "
            f"pref_vector={self.pref_vector}"
        )
