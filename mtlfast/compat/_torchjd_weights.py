"""What `accelerate()` runs in place of TorchJD's weightings: mtlfast's solvers with TorchJD's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.compat._torchjd_faces import is_hooked

# A function of TorchJD's weighting object, the Gram matrix in float64, the Gram matrix as it was given, and K times the
# relative precision of a product. It returns the weights, or None if TorchJD must compute them itself.
WeightsOf = Callable[[Any, Tensor, Tensor, float], Tensor | None]


def rtol_of(given: Tensor) -> float:
    """TorchJD's relative cutoff for eigenvalues, which follows from the dtype of its matrix."""
    return len(given) * torch.finfo(given.dtype).eps


def is_gramian(given: Tensor) -> bool:
    """Whether the solvers take this matrix: float32 or float64, finite, symmetric and positive semi-definite.

    The last two may be off by rounding. TorchJD itself computes the weights of all other matrices, so that its errors
    stay its own: half precision, which most of its solvers refuse; NaN and infinity; matrices that are no Gramians; and
    the zero matrix.
    """
    if given.dtype not in (torch.float32, torch.float64) or given.shape[0] != given.shape[1]:
        return False
    gram, rounding = given.double(), 4 * rtol_of(given)
    trace = gram.trace()
    if not torch.equal(gram, gram.mT) and not bool((gram - gram.mT).abs().amax() <= rounding * trace):  # host: as below
        return False
    shifted = gram.clone()
    shifted.diagonal().add_(rounding * trace)
    # host: TorchJD's own methods work there. A Cholesky factor exists if the matrix is positive definite without NaN.
    return bool((torch.linalg.cholesky_ex(shifted).info == 0) & (trace < math.inf))


def _preferences(owner: Any, given: Tensor, *, same_dtype: bool) -> Tensor | None:
    """The preferences that the inner weighting of a method gives, one for each row of `given`.

    Args:
        owner: the outer weighting, or a ConFIG aggregator.
        given: a matrix of K rows.
        same_dtype: whether TorchJD computes with the preferences in the dtype of `given`, differentiably.

    Returns:
        [K] float64; None if TorchJD must compute the weights itself.
    """
    from torchjd.aggregation import ConstantWeighting, MeanWeighting, SumWeighting

    inner = owner.weighting
    if type(inner) not in (ConstantWeighting, MeanWeighting, SumWeighting) or is_hooked(inner):
        return None
    if type(inner) is ConstantWeighting:
        fixed = inner.weights
        differentiable = torch.is_grad_enabled() and fixed.requires_grad
        if same_dtype and (fixed.dtype != given.dtype or fixed.device != given.device or differentiable):
            return None
        if not bool(fixed.isfinite().all()):  # host: where the user keeps them
            return None
    preferences: Tensor = inner(given)
    return preferences.detach().to(given.device, torch.float64)


def _keys(orders: list[Tensor], others: bool, device: torch.device) -> Tensor:
    """Sorting keys [K, K] that give gradient i the order `orders[i]`.

    Args:
        orders: K permutations: of all K tasks, or with `others` of the list of the other K - 1 tasks.
        others: which of the two.
        device: of the result.
    """
    K = len(orders)
    keys = torch.empty(K, K, dtype=torch.float64)
    for i, order in enumerate(orders):
        tasks = order + (order >= i) if others else order
        keys[i, tasks] = torch.arange(len(order), dtype=torch.float64)
        if others:
            keys[i, i] = -1
    return keys.to(device)  # host: TorchJD draws its orders on the CPU


def pcgrad(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor:
    """As TorchJD, it draws one torch.randperm for each gradient."""
    orders = [torch.randperm(len(gram)) for _ in range(len(gram))]
    return ops.solve(gram, "pcgrad", {"mean": False, "itself": False}, {"keys": _keys(orders, False, gram.device)})


def gradvac(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor:
    """The running cosines stay in TorchJD's buffer, on the CPU and in its dtype."""
    weighting._ensure_state(len(gram), given.dtype)
    orders = [torch.randperm(len(gram) - 1) for _ in range(len(gram))]
    state = torch.nn.functional.pad(weighting._phi_t.to(gram), (0, 0, 1, 0))  # mtlfast counts in a row before them
    params = {"beta": float(weighting.beta), "eps": float(weighting.eps), "rtol": 0.0}
    weights = ops.solve(gram, "gradvac", params, {"keys": _keys(orders, True, gram.device)}, state)
    weighting._phi_t = state[1:].to(weighting._phi_t)  # host: where TorchJD keeps it
    return weights


def mgda(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor:
    """As TorchJD, it takes steps of Frank and Wolfe's algorithm, with the same stopping rule."""
    params = {"epsilon": weighting.epsilon, "max_iters": weighting.max_iters, "norms": 0}
    return ops.solve(gram, "mgda", params)


def cagrad(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor | None:
    """Solves to the optimum, where TorchJD's convex solver stops some digits before.

    TorchJD serves a `c` without one.
    """
    if not 0 < weighting.c < math.inf:
        return None
    eps = float(weighting.norm_eps)
    params = {"c": float(weighting.c), "rescale": 0, "norm_eps": eps, "rtol": rtol / len(gram), "clip": False}
    weights = ops.solve(gram, "cagrad", params)
    return torch.where(gram.trace() < eps, 0.0, weights)


def _dual_cone(method: str) -> WeightsOf:
    def weights_of(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor | None:
        from torchjd.linalg import QuadprogProjector

        projector = weighting.projector
        if type(projector) is not QuadprogProjector:  # a projector of the user's
            return None
        reg_eps = float(projector.reg_eps)
        if reg_eps < 4 * rtol_of(given):  # quadprog may refuse a matrix with so little regularisation
            return None
        preferences = _preferences(weighting, given, same_dtype=False)
        if preferences is None:
            return None
        weights = ops.solve(gram, method, {"reg_eps": reg_eps, "of_trace": True}, {"preferences": preferences})
        # TorchJD treats a matrix whose trace is below norm_eps as zero; then its weights are the preferences
        # themselves.
        return torch.where(gram.trace() < projector.norm_eps, preferences.clamp(min=0.0), weights)

    return weights_of


def aligned_mtl(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor | None:
    """TorchJD itself refuses an unknown scale mode."""
    if weighting.scale_mode not in ("min", "median", "rmse"):
        return None
    preferences = _preferences(weighting, given, same_dtype=True)
    if preferences is None:
        return None
    params = {"scale_mode": ("min", "median", "rmse").index(weighting.scale_mode), "rtol": rtol}
    return ops.solve(gram, "aligned_mtl", params, {"preferences": preferences})


def imtlg(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor:
    """Uses the cutoff of torch's pseudo-inverse. As in TorchJD, weights whose sum is below 1e-12 become zero."""
    weights = ops.solve(gram, "imtlg", {"rtol": rtol})
    norms, products = gram.diagonal().sqrt(), gram @ weights
    total = (norms @ products) / (products @ products)  # of v = G^+ norms: weights = v / total
    return torch.where(total.abs() < 1e-12, 0.0, weights)


def krum(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor | None:
    """TorchJD itself refuses too few gradients. It also breaks the ties that scores of one nearest neighbour bring."""
    weighting._check_matrix_shape(given)
    if len(gram) - weighting.n_byzantine - 2 == 1:
        return None
    params = {"n_byzantine": weighting.n_byzantine, "n_selected": weighting.n_selected}
    return ops.solve(gram, "krum", params)


def fairgrad(weighting: Any, gram: Tensor, given: Tensor, rtol: float) -> Tensor | None:
    """TorchJD itself serves a bound on the iterations, because that changes the result."""
    if weighting.max_iters is not None or not weighting.alpha >= 0:
        return None
    return ops.solve(gram, "fairgrad", {"alpha": float(weighting.alpha), "rtol": rtol})


# By the weighting's name in torchjd.aggregation.
WEIGHTS_OF: dict[str, WeightsOf] = {
    "PCGradWeighting": pcgrad,
    "GradVacWeighting": gradvac,
    "MGDAWeighting": mgda,
    "CAGradWeighting": cagrad,
    "UPGradWeighting": _dual_cone("upgrad"),
    "DualProjWeighting": _dual_cone("dualproj"),
    "AlignedMTLWeighting": aligned_mtl,
    "IMTLGWeighting": imtlg,
    "KrumWeighting": krum,
    "FairGradWeighting": fairgrad,
}
# They decide no ranks, hulls or feasibility: float32 sums are enough.
BY_FAST_SUMS = {"PCGradWeighting", "GradVacWeighting"}


def config(aggregator: Any, gram: Tensor, jacobian: Tensor, columns: int) -> Tensor | None:
    """ConFIG's weights, with the cutoff that torch's pseudo-inverse has for a matrix of so many columns.

    Args:
        aggregator: TorchJD's ConFIG object.
        gram: [K, K] float64, the Gram matrix of the whole Jacobian.
        jacobian: [K, ...], a part of the Jacobian, for its dtype and its number of rows.
        columns: how many columns the whole Jacobian has.

    Returns:
        [K] float64; None if TorchJD must compute the weights itself.
    """
    if not is_gramian(gram.to(jacobian.dtype)):
        return None
    preferences = _preferences(aggregator, jacobian, same_dtype=True)
    if preferences is None:
        return None
    cutoff = max(len(gram), columns) * torch.finfo(jacobian.dtype).eps
    rtol = max(cutoff**2, rtol_of(gram))  # a float64 Gram matrix cannot tell smaller eigenvalues from rounding
    return ops.solve(gram, "config", {"length": -1, "task": 0, "rtol": rtol}, {"preferences": preferences})
