"""What is timed: each op on one workload, its plain-PyTorch rival, and how many bytes it must move."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.aggregation import PCGrad
from mtlfast.bench import baselines
from mtlfast.task_gradients import TaskGradients


class Contest(NamedTuple):
    """One op on one workload: the native way, the plain way, and how often J's bytes go over the memory bus."""

    native: Callable[[], object]
    plain: Callable[[], object]
    passes: float  # bytes read and written, over the bytes of J


def contests_on(grads: TaskGradients) -> dict[str, Contest]:
    """The contests, by op, on one workload."""
    K = grads.num_tasks
    ones = torch.ones(K, dtype=torch.float64, device=grads.device)
    weights = ones / (2 * K)  # in place, again and again: nothing may grow
    signs = ones.neg()
    pcgrad, out, own = PCGrad(), ops.combine(grads, weights), list(grads.rows[0])
    plain_combine = baselines.plain_combine(grads, weights)
    return {
        "gram": Contest(lambda: ops.gram(grads), baselines.plain_gram(grads), 1),
        "norms": Contest(lambda: ops.norms(grads), baselines.plain_norms(grads), 1),
        "combine": Contest(lambda: ops.combine(grads, weights, out=out), plain_combine, 1 + 1 / K),
        "combine in place": Contest(lambda: ops.combine(grads, weights, out=own), plain_combine, 1 + 1 / K),
        "flatten": Contest(lambda: ops.flatten(grads), baselines.plain_flatten(grads), 2),
        "scale_": Contest(lambda: ops.scale_(grads, signs), baselines.plain_scale(grads, signs), 2),
        "PCGrad": Contest(lambda: _surgery(grads, pcgrad, out), baselines.plain_pcgrad(grads), 2 + 1 / K),
    }


def many_outputs(grads: TaskGradients) -> dict[str, Contest]:
    """`combine` with as many outputs as tasks, as `project` uses it; it has no plain rival of its own."""
    coefficients = torch.randn(grads.num_tasks, grads.num_tasks, device=grads.device)
    out = ops.combine(grads, coefficients)

    def run() -> object:
        return ops.combine(grads, coefficients, out=out)

    return {"combine, R = K": Contest(run, run, 2)}


def _surgery(grads: TaskGradients, pcgrad: PCGrad, out: list[Tensor | None]) -> None:
    """From the lists of gradients to the update: marshalling, Gram matrix, solve, combine."""
    fresh = TaskGradients.from_rows(grads.rows)
    weights, _ = pcgrad.weigh(fresh)
    ops.combine(fresh, weights, out=out)
