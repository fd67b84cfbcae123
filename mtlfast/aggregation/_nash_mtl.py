"""Nash-MTL."""

from __future__ import annotations

from mtlfast._settings import Or, Real, Whole
from mtlfast._vectors import Vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._loss_scale import NeedsLossScale
from mtlfast.aggregation._preferences import HasPreferences
from mtlfast.aggregation._step import Step


class NashMTL(HasPreferences, NeedsLossScale):
    """Finds the Nash bargaining solution: any other update costs some tasks more, in relative terms, than others gain.

    The gain of task i is (G w)_i, the dot product of its gradient and the update. The weights w > 0 solve (G w)_i =
    1 / w_i, up to a residual of 1e-10. Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022), Algorithm
    1; the paper and other libraries solve a sequence of convex programs and stop at 1e-3. The update has the length
    sqrt(K), however long the gradients are. If a convex combination of the gradients is zero up to `rtol`, these
    equations have no solution. The weights are then MGDA's, whose update is zero, and `diagnostics()` counts the step.

    Args:
        n_tasks: make room in the state for so many tasks at once. None: the state grows with the tasks.
        max_norm: a longer update is shortened to this norm; 0 never shortens. With `loss_scale` the method computes the
            update for the losses without that factor, then multiplies the update by it.
        update_weights_every: compute new weights every so many steps. In between the last weights are used, and a long
            update is shortened as always.
        pref_vector: [n], positive, the tasks' bargaining powers p. The equations are then (G w)_i = c_i / w_i with c =
            K p / sum(p) over the present tasks (Kalai, "Nonsymmetric Nash Solutions and Replications of 2-Person
            Bargaining", 1977). None: all the same.

    Raises:
        ValueError: an argument is outside of its range, or `pref_vector` does not have one dimension; at a call, there
            are more tasks than `n_tasks`, or other tasks than those that have preferences.

    State: n + 3 float64 numbers for each group. Cost: two reads of K * P and one write of P; the solve takes about 3
    K^3 operations.
    """

    paper = "Navon et al., ICML 2022"
    keeps = "n weights"
    method = "nash_mtl"
    counts = ("unconverged", "decided_by_noise")
    least_preference = (0.0, False)
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
        """Raises if there are more tasks than `n_tasks`."""
        super().check(step, jacobian)
        known = max(step.present, default=-1) + 1
        if self.n_tasks is not None and known > self.n_tasks:
            raise ValueError(f"NashMTL: got {known} tasks, expected at most {self.n_tasks} as n_tasks says")

    def params(self, step: Step) -> dict[str, float]:
        """The largest norm, the steps, and the share of the largest eigenvalue below which one counts as zero."""
        every = self.update_weights_every
        return {"max_norm": self.max_norm, "update_weights_every": every, "rtol": step.rank_rtol}

    def state_shape(self, known: int) -> tuple[int, ...]:
        """Two counts (see `diagnostics`), the number of steps, then each task's last weight."""
        return (3 + (known if self.n_tasks is None else self.n_tasks),)

    def extra_repr(self) -> str:
        return (
            f"n_tasks={self.n_tasks}, max_norm={self.max_norm}, update_weights_every={self.update_weights_every}, "
            f"pref_vector={self.pref_vector}"
        )
