"""The solvers' twins: a method's own algorithm, run on a K x K factor L with L L^T = G."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast.reference.pcgrad import pcgrad_coefficients


class Group(NamedTuple):
    """One Gram matrix's problem, as a method's twin sees it."""

    factor: Tensor  # [K, K], L with L L^T = G: stands for the Jacobian
    params: Sequence[float]
    inputs: Sequence[Tensor]
    state: Tensor | None
    tasks: Sequence[int] | None


class Solver(NamedTuple):
    """A method: its function of one group, and whether that makes coefficients [K, K] instead of weights [K]."""

    run: Callable[[Group], Tensor]
    square: bool = False


def solve(
    gram: Tensor,
    method: str,
    params: Sequence[float] = (),
    inputs: Sequence[Tensor] = (),
    state: Tensor | None = None,
    tasks: Sequence[int] | None = None,
) -> Tensor:
    """Runs one method on each group of Gram matrices [..., K, K]; NaN for a group that is not finite."""
    solver, K, lead = SOLVERS[method], gram.shape[-1], gram.shape[:-2]
    count = lead.numel()
    flat_inputs = [x.double().reshape(count, *x.shape[len(lead) :]) for x in inputs]
    flat_state = None if state is None else state.view(count, -1)
    results = []
    for i, matrix in enumerate(gram.reshape(count, K, K)):
        if not matrix.isfinite().all():
            results.append(torch.full_like(matrix if solver.square else matrix[0], torch.nan))
            continue
        group_state = None if flat_state is None else flat_state[i]
        group = Group(factor_of(matrix), params, [x[i] for x in flat_inputs], group_state, tasks)
        results.append(solver.run(group))
    shape = (*lead, K, K) if solver.square else (*lead, K)
    return torch.stack(results).reshape(shape) if results else gram.new_empty(shape)


def factor_of(gram: Tensor) -> Tensor:
    """L [K, K] with L L^T = G, from its eigenvectors; a diagonal G (orthogonal tasks) keeps its exact zeros."""
    diagonal = gram.diagonal()
    if torch.equal(gram, diagonal.diag()):
        return diagonal.clamp(min=0).sqrt().diag()
    values, vectors = torch.linalg.eigh(gram)
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor


def _coefficients(group: Group) -> Tensor:
    K = len(group.factor)
    if not group.inputs:
        return pcgrad_coefficients(group.factor)
    # The other tasks of each by ascending key, ties by index; its own key, made the largest, comes last.
    keys = group.inputs[0].clone().fill_diagonal_(torch.inf)
    return pcgrad_coefficients(group.factor, keys.argsort(dim=1, stable=True)[:, : K - 1])


def _pcgrad(group: Group) -> Tensor:
    coefficients = _coefficients(group)
    return coefficients.mean(dim=0) if group.params[0] else coefficients.sum(dim=0)


SOLVERS = {
    "pcgrad": Solver(_pcgrad),
    "pcgrad_coefficients": Solver(_coefficients, square=True),
}
