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

# An input's dimensions in each group, all of them K: 2 is [K, K], 0 is one number.
DIMENSIONS = {"keys": 2, "losses": 1, "loss_scale": 0, "min_weights": 1, "preferences": 1, "shares": 1, "turns": 1}


class Solver(NamedTuple):
    """A method: its function of one group, what that takes, and what is special about it.

    The op takes params and inputs in the order of their names here, which is that of the enums in the method's header.
    """

    run: Callable[[Group], Tensor]
    params: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    required: Callable[[dict[str, float]], tuple[str, ...]] | None = None  # the inputs that these params ask for
    state: Callable[[int], int] | None = None  # elements at least, for so many tasks; None: it needs none
    square: bool = False  # coefficients [K, K] instead of weights [K]
    cross: bool = False  # reads the products of two batches


def solve(
    gram: Tensor,
    method: str,
    params: Sequence[float] = (),
    inputs: Sequence[Tensor | None] = (),
    state: Tensor | None = None,
    tasks: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The registered op in plain PyTorch: one method on each group of Gram matrices [..., K, K].

    Its arguments are as the op's, params and inputs in order (None: absent), and were checked; NaN for a group that is
    not finite, 0 for tasks that the mask leaves out.
    """
    solver, K, lead = SOLVERS[method], gram.shape[-1], gram.shape[:-2]
    count = lead.numel() if K else 0
    named = dict(zip(solver.params, params, strict=True))
    flat_inputs = {
        name: x.double().reshape(count, *[K] * DIMENSIONS[name])
        for name, x in zip(solver.inputs, inputs, strict=False)
        if x is not None
    }
    flat_state = None if state is None or state.numel() == 0 else state.view(count, -1)
    flat_mask = None if mask is None else mask.reshape(count, K)
    results = []
    for i, matrix in enumerate(gram.reshape(count, K, K)):
        own = {name: x[i] for name, x in flat_inputs.items()}
        group = Group(matrix, named, own, None if flat_state is None else flat_state[i], tasks)
        results.append(_solved(solver, group, None if flat_mask is None else flat_mask[i]))
    shape = (*lead, K, K) if solver.square else (*lead, K)
    return torch.stack(results).reshape(shape) if results else gram.new_empty(shape)


def _solved(solver: Solver, group: Group, mask: Tensor | None) -> Tensor:
    """One group's result; `group.matrix` is its Gram matrix."""
    gram = group.matrix
    if mask is not None:
        result = torch.zeros_like(gram if solver.square else gram[0])
        places = mask.nonzero().flatten()
        if len(places):
            some = places[:, None], places
            result[some if solver.square else places] = _solved(solver, _among(group, places), None)
        return result
    if not all(x.isfinite().all() for x in (gram, *group.inputs.values())):
        return torch.full_like(gram if solver.square else gram[0], torch.nan)
    # Two batches' products have no factor: their methods read the matrix itself.
    return solver.run(group._replace(cross=gram) if solver.cross else group._replace(matrix=factor_of(gram)))


def _among(group: Group, places: Tensor) -> Group:
    """The group as if its other tasks had not been given."""
    params, n, K = dict(group.params), len(places), group.num_tasks
    if "rtol" in params:  # K times the precision of one product
        params["rtol"] *= n / K
    take = {0: lambda x: x, 1: lambda x: x[places], 2: lambda x: x[places[:, None], places]}
    return group._replace(
        matrix=take[2](group.matrix),
        params=params,
        inputs={name: take[x.dim()](x) for name, x in group.inputs.items()},
        tasks=[group.present[place] for place in places.tolist()],
    )


def factor_of(gram: Tensor) -> Tensor:
    """L [K, K] with L L^T = G, from its eigenvectors; a diagonal G (orthogonal tasks) keeps its exact zeros."""
    diagonal = gram.diagonal()
    if torch.equal(gram, diagonal.diag()):
        return diagonal.clamp(min=0).sqrt().diag()
    values, vectors = torch.linalg.eigh(gram)
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor


SOLVERS = {
    "pcgrad": Solver(weights_of, ("mean", "itself"), ("keys", "turns")),
    "pcgrad_coefficients": Solver(coefficients_of, (), ("keys",), square=True),
    "gradvac": Solver(gradvac, ("beta", "eps", "rtol"), ("keys",), state=lambda known: (known + 1) * known),
    "mgda": Solver(
        mgda,
        ("epsilon", "max_iters", "norms"),
        ("losses", "min_weights"),
        required=lambda params: ("losses",) if params["norms"] >= 2 else (),
    ),
    "cagrad": Solver(cagrad, ("c", "rescale", "norm_eps", "rtol", "clip"), ("preferences",)),
    "upgrad": Solver(upgrad, ("reg_eps", "of_trace"), ("preferences",)),
    "dualproj": Solver(dualproj, ("reg_eps", "of_trace"), ("preferences",)),
    "pcd": Solver(pcd, ("beta", "eps", "tau", "rtol"), ("shares",), state=lambda known: 2 * (known + 1)),
    "krum": Solver(krum, ("n_byzantine", "n_selected")),
    "aligned_mtl": Solver(aligned_mtl, ("scale_mode", "rtol"), ("preferences",)),
    "imtlg": Solver(imtlg, ("rtol",)),
    "config": Solver(config, ("length", "task", "rtol"), ("preferences",)),
    "nash_mtl": Solver(
        nash_mtl,
        ("max_norm", "update_weights_every", "rtol"),
        ("loss_scale", "preferences"),
        state=lambda known: 3 + known,
    ),
    "fairgrad": Solver(fairgrad, ("alpha", "rtol"), ("loss_scale",)),
    "norm_balance": Solver(norm_balance, ("target", "task")),
    "clip_norm": Solver(clip_norm, ("max_norm",), ("loss_scale",)),
    "cross_norm": Solver(cross_norm),
    "inverse_norm": Solver(inverse_norm),
    "modo": Solver(modo, ("gamma", "rho"), state=lambda known: known, cross=True),
    "sdmgrad": Solver(
        sdmgrad, ("lr", "momentum", "n_iter", "lambda_"), ("preferences",), state=lambda known: known, cross=True
    ),
}
