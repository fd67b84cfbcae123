"""What is timed: each op on one workload, its plain-PyTorch rival, and how many bytes it must move."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.aggregation import DBMTL, Aggregator, Groups, MoCo, PCGrad, Step
from mtlfast.bench import baselines
from mtlfast.task_gradients import TaskGradients


class Contest(NamedTuple):
    """One op on one workload: the native way, the plain way, and how often J's bytes go over the memory bus."""

    native: Callable[[], object]
    plain: Callable[[], object]
    passes: float  # bytes read and written, over the bytes of J


# Op -> how often it must move J's bytes, and how often those of one update direction, which are a K-th of them.
PASSES = {
    "gram": (1, 0),
    "cross-Gram": (1, 0),
    "norms": (1, 0),
    "combine": (1, 1),
    "combine in place": (1, 1),
    "flatten": (2, 0),
    "scale_": (2, 0),
    "advance_": (3, 1),
    "excess_risks": (2, 0),
    "PCGrad": (2, 1),
    "PCGrad by tensor": (2, 1),
    "grad_drop": (1, 1),
    "trimmed_mean": (1, 1),
}


def contests_on(grads: TaskGradients) -> dict[str, Contest]:
    """The contests, by op, on one workload."""
    K = grads.num_tasks
    ones = torch.ones(K, dtype=torch.float64, device=grads.device)
    weights = ones / (2 * K)  # in place, again and again: nothing may grow
    signs = ones.neg()
    first, second = TaskGradients(grads.rows[: K // 2]), TaskGradients(grads.rows[K // 2 :])
    half = ones / 2
    trim = min(1, (K - 1) // 2)
    out, own = ops.combine(grads, weights), list(grads.rows[0])
    plain_combine = baselines.plain_combine(grads, weights)

    @cache
    def state() -> TaskGradients:  # as large as J, so only where a contest on it runs
        return TaskGradients([[None if g is None else torch.zeros_like(g) for g in row] for row in grads.rows])

    def advance() -> object:
        return ops.advance_(grads, state(), half, half, weights, square=True, out=out)

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "gram": (lambda: ops.gram(grads), baselines.plain_gram(grads)),
        "cross-Gram": (lambda: ops.gram(first, second), baselines.plain_gram(first, second)),
        "norms": (lambda: ops.norms(grads), baselines.plain_norms(grads)),
        "combine": (lambda: ops.combine(grads, weights, out=out), plain_combine),
        "combine in place": (lambda: ops.combine(grads, weights, out=own), plain_combine),
        "flatten": (lambda: ops.flatten(grads), baselines.plain_flatten(grads)),
        "scale_": (lambda: ops.scale_(grads, signs), baselines.plain_scale(grads, signs)),
        "advance_": (advance, lambda: baselines.plain_advance(grads, state(), half, weights)),
        "excess_risks": (
            lambda: ops.excess_risks(grads, state()),
            lambda: baselines.plain_excess_risks(grads, state()),
        ),
        "PCGrad": (direction(PCGrad(), grads, out), baselines.plain_pcgrad(grads)),
        "PCGrad by tensor": (
            direction(PCGrad(), grads, out, by_tensor=True),
            baselines.plain_pcgrad_by_tensor(grads),
        ),
        "grad_drop": (lambda: _drop(grads, out), baselines.plain_grad_drop(grads)),
        "trimmed_mean": (lambda: ops.trimmed_mean(grads, trim, out), baselines.plain_trimmed_mean(grads, trim)),
    }
    return {op: Contest(*ways[op], of_J + of_direction / K) for op, (of_J, of_direction) in PASSES.items()}


def direction(
    aggregator: Aggregator, grads: TaskGradients, out: list[Tensor | None], by_tensor: bool = False
) -> Callable[[], object]:
    """From the lists of gradients to the update in `out`: marshalling, Gram matrix, solve, combine.

    Args:
        aggregator: the method.
        grads: K tasks x T tensors.
        out: T tensors to write.
        by_tensor: make each tensor a group, with a Gram matrix and weights of its own.
    """
    groups = Groups.by_name([str(t) for t in range(len(out))]) if by_tensor else None

    def run() -> object:
        return aggregator.aggregate(TaskGradients.from_rows(grads.rows), Step(grads.num_tasks, groups=groups), out)

    return run


def many_outputs(grads: TaskGradients) -> dict[str, Contest]:
    """`combine` with as many outputs as tasks, as `project` uses it; it has no plain rival of its own."""
    coefficients = torch.randn(grads.num_tasks, grads.num_tasks, device=grads.device)
    out = ops.combine(grads, coefficients)

    def run() -> object:
        return ops.combine(grads, coefficients, out=out)

    return {"combine, R = K": Contest(run, run, 2)}


def accumulating(grads: TaskGradients) -> dict[str, Contest]:
    """`combine` that adds to what is there, as a second micro-batch does; it has no plain rival of its own."""
    weights = torch.full((grads.num_tasks,), 0.5 / grads.num_tasks, dtype=torch.float64, device=grads.device)
    out = ops.combine(grads, weights)

    def run() -> object:
        return ops.combine(grads, weights, out=out, accumulate=True)

    return {"combine, accumulate": Contest(run, run, 1 + 2 / grads.num_tasks)}


def with_state(grads: TaskGradients) -> dict[str, Contest]:
    """Whole steps of methods that keep a tensor for each task and parameter, and read and write these beside J."""
    K = grads.num_tasks
    losses = torch.linspace(1, 2, K, dtype=torch.float64, device=grads.device)
    out = Aggregator.targets(grads)

    def native(method: Aggregator) -> Callable[[], object]:
        return lambda: method.prepare(TaskGradients.from_rows(grads.rows), Step(K, losses), out)()

    return {
        "MoCo": Contest(native(MoCo()), baselines.plain_moco(grads, losses), 5 + 1 / K),
        "DB-MTL": Contest(native(DBMTL()), baselines.plain_db_mtl(grads, losses), 5 + 1 / K),
    }


def _drop(grads: TaskGradients, out: list[Tensor | None]) -> None:
    """The draw of the seed, and what is kept."""
    ops.grad_drop(grads, torch.randint(2**63 - 1, (1,), device=grads.device), out=out)
