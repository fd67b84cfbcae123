"""GradDrop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast._by_task import take
from mtlfast._numbers import shown
from mtlfast._vectors import Vector, vector
from mtlfast.aggregation._jacobian import AsksJacobian
from mtlfast.aggregation._random_order import HasGenerator
from mtlfast.aggregation._step import Step
from mtlfast.task_gradients import TaskGradients


class GradDrop(HasGenerator):
    """Keeps, element by element, the gradients of one sign, drawn by how much the tasks agree, and sums them.

    The sign purity p = (1 + sum_k g_k / sum_k |g_k|) / 2 of an element is the share of its positive gradients. For a
    uniform random number u the positive ones are kept if f(p) > u and the negative ones if f(p) < u. Chen et al., "Just
    Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout" (NeurIPS 2020), Algorithm 1. The paper
    drops gradients of the features that the tasks share: `mtlfast.backward(..., at=features)`.

    Args:
        f: a function of the purities, which takes a tensor of any shape, float32 or for float64 gradients float64, and
            returns thresholds of its shape and dtype. It should be increasing. None: the purities themselves.
        leak: [n], from 0 to 1, how much of a task's gradients counts where they are not kept. None: nothing.
        generator: the generator of the seed that each call draws, on the gradients' device. `state_dict()` saves its
            state. None: torch's global generator.

    Raises:
        TypeError: `f` cannot be called.
        ValueError: `leak` is not a vector of numbers from 0 to 1; at a call, it has not one entry for each task.

    In eval mode nothing is drawn, and the direction is the average one: f(p) of the positive gradients and 1 - f(p) of
    the negative ones. An element for which a gradient is inf or NaN is NaN.

    Cost: one read of K * P and one write of P; with `f` two reads, and a write and a read of P besides what `f` takes.
    The random numbers follow from the seed and from the element's place, so they do not depend on threads or on the
    device. Scale-free.
    """

    paper = "Chen et al., NeurIPS 2020"
    by_element = True
    leak: Tensor | None

    def __init__(
        self,
        f: Callable[[Tensor], Tensor] | None = None,
        leak: Vector | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(generator)
        if f is not None and not callable(f):
            raise TypeError(f"GradDrop: f is a {type(f).__name__}, expected a function of the purities or None")
        self.f = f
        given = None if leak is None else vector(self, "leak", leak, least=0)
        if given is not None and bool((given > 1).any()):  # host: only when the vector is given
            raise ValueError(f"GradDrop: leak is {shown(leak)}, expected numbers from 0 to 1")
        self.register_buffer("leak", given)

    def check(self, step: Step, jacobian: AsksJacobian | None = None) -> None:
        """Raises if the tasks are not those that have a leak."""
        super().check(step, jacobian)
        if self.leak is not None:
            self.check_entries("leak", "entries of leak", step)

    def aggregate(self, grads: TaskGradients, step: Step, out: list[Tensor | None]) -> None:
        """Draws one seed, and writes what is kept."""
        thresholds = None
        if self.f is not None:
            thresholds = [None if purity is None else self._threshold(purity) for purity in ops.sign_purity(grads)]
        seed = None
        if step.training:
            seed = torch.randint(2**63 - 1, (1,), generator=self.generator, device=grads.device)
        ops.grad_drop(grads, seed, thresholds=thresholds, leak=self._leaks(grads, step), out=out)

    def _threshold(self, purity: Tensor) -> Tensor:
        """What f returns, checked before a seed is drawn."""
        assert self.f is not None
        threshold = self.f(purity)
        if not isinstance(threshold, Tensor):
            raise TypeError(f"GradDrop: f returned a {type(threshold).__name__}, expected a tensor")
        if threshold.shape != purity.shape or threshold.dtype != purity.dtype:
            raise ValueError(
                f"GradDrop: f returned {list(threshold.shape)} {threshold.dtype}, expected {list(purity.shape)} "
                f"{purity.dtype} as the purities that it was given"
            )
        return threshold

    def _leaks(self, grads: TaskGradients, step: Step) -> Tensor | None:
        """The present tasks' leaks [K] on the gradients' device."""
        if self.leak is None:
            return None
        if self.leak.device != grads.device:  # only once, because a copy from the host waits
            self.leak = self.leak.to(grads.device)
        return take(self.leak, step.present)

    def extra_repr(self) -> str:
        shown_leak = None if self.leak is None else self.leak.tolist()  # host: the user prints it
        return f"f={self.f}, leak={shown_leak}"
