"""The solvers' twins: a method's own algorithm, run on a K x K factor L with L L^T = G."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtlfast.reference.aligned_mtl import aligned_mtl
from mtlfast.reference.cagrad import cagrad
from mtlfast.reference.conflict_free import config
from mtlfast.reference.dual_cone import dualproj, upgrad
from mtlfast.reference.fair_point import fairgrad, nash_mtl
from mtlfast.reference.gradvac import gradvac
from mtlfast.reference.group import Group
from mtlfast.reference.imtlg import imtlg
from mtlfast.reference.krum import krum
from mtlfast.reference.mgda import mgda
from mtlfast.reference.norm_balance import clip_norm, cross_norm, inverse_norm, norm_balance
from mtlfast.reference.pcd import pcd
from mtlfast.reference.pcgrad import coefficients_of, weights_of
from mtlfast.reference.two_batches import modo, sdmgrad


class Solver(NamedTuple):
    """A method: its function of one group, and what is special about it."""

    run: Callable[[Group], Tensor]
    square: bool = False  # coefficients [K, K] instead of weights [K]
    cross: bool = False  # reads the products of two batches


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
        own = [x[i] for x in flat_inputs]
        if not all(x.isfinite().all() for x in (matrix, *own)):
            results.append(torch.full_like(matrix if solver.square else matrix[0], torch.nan))
            continue
        group_state = None if flat_state is None else flat_state[i]
        # Two batches' products have no factor: their methods read the matrix itself.
        rows = matrix if solver.cross else factor_of(matrix)
        results.append(solver.run(Group(rows, params, own, group_state, tasks, matrix if solver.cross else None)))
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


SOLVERS = {
    "pcgrad": Solver(weights_of),
    "pcgrad_coefficients": Solver(coefficients_of, square=True),
    "gradvac": Solver(gradvac),
    "mgda": Solver(mgda),
    "cagrad": Solver(cagrad),
    "upgrad": Solver(upgrad),
    "dualproj": Solver(dualproj),
    "pcd": Solver(pcd),
    "krum": Solver(krum),
    "aligned_mtl": Solver(aligned_mtl),
    "imtlg": Solver(imtlg),
    "config": Solver(config),
    "nash_mtl": Solver(nash_mtl),
    "fairgrad": Solver(fairgrad),
    "norm_balance": Solver(norm_balance),
    "clip_norm": Solver(clip_norm),
    "cross_norm": Solver(cross_norm),
    "inverse_norm": Solver(inverse_norm),
    "modo": Solver(modo, cross=True),
    "sdmgrad": Solver(sdmgrad, cross=True),
}
