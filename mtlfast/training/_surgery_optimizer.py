"""`SurgeryOptimizer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from mtlfast._arguments import Shared, check_methods
from mtlfast._backward import backward
from mtlfast._losses import Losses
from mtlfast._step_result import StepResult
from mtlfast.aggregation import Aggregator
from mtlfast.jacobian import TaskGradientAccumulator
from mtlfast.training._wrapped_optimizer import WrappedOptimizer
from mtlfast.weighting import LossWeighting


class SurgeryOptimizer(WrappedOptimizer):
    """Wraps a torch optimizer. Its `backward(losses)` takes the place of `sum(losses).backward()`.

    It is for code that is written around an optimizer, and computes what `mtlfast.backward` and the bare optimizer
    compute. It is a torch Optimizer: LR schedulers, GradScaler and other wrappers take it. Parameter groups, state,
    hooks and all attributes but its own are those of the wrapped optimizer. Hooks are called with the wrapped
    optimizer. Give a GradScaler this one in all its calls, because it keeps a record for each optimizer object.

    `state_dict` is that of the wrapped optimizer, so that checkpoints can be loaded with and without this wrapper. The
    aggregator and the weighting are not in it. They are modules: move them to the device and save their own state
    dicts. Pickle and deepcopy take them along.

    Args:
        optimizer: the optimizer that takes the steps. What a weighting learns belongs in its parameters.
        aggregator: the method, as for `mtlfast.backward`.
        shared: the parameters that the tasks share, in any form that `mtlfast.backward` takes, or None. It is passed on
            at each step. A generator is read once, here.
        weighting: a loss weighting, as for `mtlfast.backward`.

    Raises:
        TypeError: `optimizer` is not a torch Optimizer, or `aggregator` or `weighting` is not an instance of its base
            class.

    Cost: that of `mtlfast.backward`.

    Example:
        >>> import torch, mtlfast
        >>> from mtlfast.aggregation import PCGrad
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = mtlfast.SurgeryOptimizer(torch.optim.SGD([w], lr=1.0), PCGrad(), shared=[w])
        >>> optimizer.zero_grad()
        >>> result = optimizer.backward([w[0], w[1] - w[0]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([-0.5000, -1.5000], requires_grad=True)
    """

    aggregator: Aggregator
    shared: Any  # what `shared=` of `mtlfast.backward` takes
    weighting: LossWeighting | None

    def __init__(
        self,
        optimizer: Optimizer,
        aggregator: Aggregator,
        *,
        shared: Shared | None = None,
        weighting: LossWeighting | None = None,
    ) -> None:
        check_methods(aggregator, weighting, type(self).__name__)
        kept = list(shared) if isinstance(shared, Iterator) else shared
        super().__init__(optimizer, aggregator=aggregator, shared=kept, weighting=weighting)

    def backward(self, losses: Losses | TaskGradientAccumulator, **options: Any) -> StepResult:
        """Calls `mtlfast.backward` with this optimizer's aggregator, shared parameters and weighting.

        Args:
            losses: the task losses, in any form that `mtlfast.backward` takes.
            options: its other arguments, such as `loss_scale`, `retain_graph` or `at`. An accumulator, `features` and
                `at` say themselves what is shared, and take the place of `shared`.

        Returns:
            What `mtlfast.backward` returns. A closure for `step` can return `result.losses.sum()`.

        Raises:
            ValueError, TypeError, RuntimeError: as `mtlfast.backward`.
        """
        says = isinstance(losses, TaskGradientAccumulator) or options.keys() & {"features", "at"}
        shared = None if says else self.shared
        return backward(losses, self.aggregator, shared=shared, weighting=self.weighting, **options)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(aggregator={self.aggregator!r}, weighting={self.weighting!r}, "
            f"optimizer={self._optim!r})"
        )
