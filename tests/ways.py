"""One step of `mtlfast.backward` on a trunk and heads, by each of the ways to compute the task gradients."""

from collections.abc import Callable

from torch import Tensor, nn

import mtlfast
from mtlfast.aggregation import Aggregator

WAYS = ["losses", "closures", "accumulator", "features", "at"]
MICRO_BATCHES = 2  # of the accumulator


def passes(way: str, num_tasks: int) -> int:
    """The number of backward passes that reach the trunk in one step."""
    return {"accumulator": MICRO_BATCHES * num_tasks, "at": 1}.get(way, num_tasks)


def step(
    way: str,
    trunk: Callable[[Tensor], Tensor],
    heads: nn.ModuleList,
    x: Tensor,
    aggregator: Aggregator,
    **more,
) -> mtlfast.StepResult:
    """A step of one way. All give the same `.grad`, but for `at` with a method whose weights depend on the gradients.

    The shared parameters are those of `trunk`, or those that more than one loss reaches if it is not a module.
    """
    shared = [p for p in trunk.parameters() if p.requires_grad] if isinstance(trunk, nn.Module) else None

    def losses(features):
        return [(head(features) - k).square().mean() for k, head in enumerate(heads)]

    if way == "closures":
        closures = [lambda k=k: (heads[k](trunk(x)) - k).square().mean() for k in range(len(heads))]
        return mtlfast.backward(closures, aggregator, shared=shared, **more)
    if way == "accumulator":
        accumulator = mtlfast.TaskGradientAccumulator(shared)
        for part in x.chunk(MICRO_BATCHES):
            accumulator.add(losses(trunk(part)))
        return mtlfast.backward(accumulator, aggregator, **more)
    features = trunk(x)
    source = {"losses": {"shared": shared}, "features": {"features": features}, "at": {"at": features}}[way]
    return mtlfast.backward(losses(features), aggregator, **source, **more)
