"""TorchJD's weightings on mtlfast's solvers: what each reads of its module, with TorchJD's absolute epsilons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlfast import ops
from mtlfast.compat._torchjd_faces import is_hooked

# (the weighting, its Gram matrix in float64, that matrix as it was given) -> the weights, or None: not this time.
Engine = Callable[[Any, Tensor, Tensor], Tensor | None]


def _rtol(given: Tensor) -> float:
    """TorchJD's cutoff for eigenvalues: that of the dtype it computes in."""
    return len(given) * torch.finfo(given.dtype).eps


def is_gramian(given: Tensor) -> bool:
    """Is it what solvers take: float32 or float64, finite, symmetric and positive semi-definite but for rounding?

    All else is TorchJD's own, with its errors: half precision, which most of its solvers refuse; NaN and infinity;
    Gramians that are none; and zero.
    """
    if given.dtype not in (torch.float32, torch.float64) or given.shape[0] != given.shape[1]:
        return False
    gram, rounding = given.double(), 4 * _rtol(given)
    trace = gram.trace()
    if not torch.equal(gram, gram.mT) and not bool((gram - gram.mT).abs().amax() <= rounding * trace):  # host: as below
        return False
    shifted = gram.clone()
    shifted.diagonal().add_(rounding * trace)
    # host: TorchJD's own methods work there. A factor exists of what is above zero and holds no NaN.
    return bool((torch.linalg.cholesky_ex(shifted).info == 0) & (trace < math.inf))


def _preferences(owner: Any, given: Tensor, *, same_dtype: bool) -> Tensor | None:
    """What the method's inner weighting prefers, one number a row of `given`; None: TorchJD must look at it itself.

    Args:
        owner: the weighting, or ConFIG.
        given: a matrix of K rows.
        same_dtype: does TorchJD compute with them in the dtype of `given`, differentiably?
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
    """Keys [K, K] that give each gradient this order; with `others` it is one of the list of the other tasks."""
    K = len(orders)
    keys = torch.empty(K, K, dtype=torch.float64)
    for i, order in enumerate(orders):
        tasks = order + (order >= i) if others else order
        keys[i, tasks] = torch.arange(len(order), dtype=torch.float64)
        if others:
            keys[i, i] = -1
    return keys.to(device)  # host: drawn there, by TorchJD's generator


def pcgrad(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """One torch.randperm a gradient, as there."""
    orders = [torch.randperm(len(gram)) for _ in range(len(gram))]
    return ops.solve(gram, "pcgrad", {"mean": False, "itself": False}, {"keys": _keys(orders, False, gram.device)})


def gradvac(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """Its running cosines stay in TorchJD's buffer, on the CPU and in its dtype."""
    weighting._ensure_state(len(gram), given.dtype)
    orders = [torch.randperm(len(gram) - 1) for _ in range(len(gram))]
    state = torch.nn.functional.pad(weighting._phi_t.to(gram), (0, 0, 1, 0))  # mtlfast counts in a row before them
    params = {"beta": float(weighting.beta), "eps": float(weighting.eps), "rtol": 0.0}
    weights = ops.solve(gram, "gradvac", params, {"keys": _keys(orders, True, gram.device)}, state)
    weighting._phi_t = state[1:].to(weighting._phi_t)  # host: where TorchJD keeps it
    return weights


def mgda(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """Frank and Wolfe's steps, as many as there."""
    params = {"epsilon": weighting.epsilon, "max_iters": weighting.max_iters, "norms": 0}
    return ops.solve(gram, "mgda", params)


def cagrad(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
    """To the optimum, where TorchJD's convex solver stops some digits before; without a ball it has no optimum."""
    if not 0 < weighting.c < math.inf:
        return None
    eps = float(weighting.norm_eps)
    weights = ops.solve(gram, "cagrad", {"c": float(weighting.c), "rescale": 0, "norm_eps": eps, "rtol": 0.0})
    return torch.where(gram.trace() < eps, 0.0, weights)


def _dual_cone(method: str) -> Engine:
    def engine(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
        from torchjd.linalg import QuadprogProjector

        projector = weighting.projector
        if type(projector) is not QuadprogProjector:  # someone's own
            return None
        reg_eps = float(projector.reg_eps)
        if reg_eps < 4 * _rtol(given):  # its solver may refuse such a matrix
            return None
        preferences = _preferences(weighting, given, same_dtype=False)
        if preferences is None:
            return None
        weights = ops.solve(gram, method, {"reg_eps": reg_eps, "of_trace": True}, {"preferences": preferences})
        # It takes a matrix whose trace is below eps for zero; then the preferences must be kept, and nothing else.
        return torch.where(gram.trace() < projector.norm_eps, preferences.clamp(min=0.0), weights)

    return engine


def aligned_mtl(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
    """An unknown scale mode is left to TorchJD's own error."""
    if weighting.scale_mode not in ("min", "median", "rmse"):
        return None
    preferences = _preferences(weighting, given, same_dtype=True)
    if preferences is None:
        return None
    params = {"scale_mode": ("min", "median", "rmse").index(weighting.scale_mode), "rtol": _rtol(given)}
    return ops.solve(gram, "aligned_mtl", params, {"preferences": preferences})


def imtlg(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """The pseudo-inverse with torch's own cutoff; TorchJD's weights are zero where the inverse is as small as 1e-12."""
    weights = ops.solve(gram, "imtlg", {"rtol": _rtol(given)})
    norms, products = gram.diagonal().sqrt(), gram @ weights
    total = (norms @ products) / (products @ products)  # of v = G^+ norms: weights = v / total
    return torch.where(total.abs() < 1e-12, 0.0, weights)


def krum(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
    """Too few gradients are TorchJD's own error, and where one nearest other counts it breaks the tie of each two."""
    weighting._check_matrix_shape(given)
    if len(gram) - weighting.n_byzantine - 2 == 1:
        return None
    params = {"n_byzantine": weighting.n_byzantine, "n_selected": weighting.n_selected}
    return ops.solve(gram, "krum", params)


def fairgrad(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
    """A bound on the iterations, which is another result, is left to TorchJD."""
    if weighting.max_iters is not None or not weighting.alpha >= 0:
        return None
    return ops.solve(gram, "fairgrad", {"alpha": float(weighting.alpha), "rtol": _rtol(given)})


# The names of weightings in torchjd.aggregation.
ENGINES: dict[str, Engine] = {
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


def config(aggregator: Any, gram: Tensor, jacobian: Tensor, columns: int) -> Tensor | None:
    """ConFIG's weights; its pseudo-inverse cuts singular values of a matrix that wide off by torch's own rule.

    Args:
        aggregator: a ConFIG of TorchJD's.
        gram: [K, K] float64.
        jacobian: [K, ...], a part of the Jacobian, for its dtype and its number of rows.
        columns: of the whole Jacobian.

    Returns:
        [K] float64, or None: not this time.
    """
    if not is_gramian(gram.to(jacobian.dtype)):
        return None
    preferences = _preferences(aggregator, jacobian, same_dtype=True)
    if preferences is None:
        return None
    cutoff = max(len(gram), columns) * torch.finfo(jacobian.dtype).eps
    rtol = max(cutoff**2, _rtol(gram))  # of a Gram matrix in float64 no more is known
    return ops.solve(gram, "config", {"length": -1, "task": 0, "rtol": rtol}, {"preferences": preferences})
