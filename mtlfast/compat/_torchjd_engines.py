"""TorchJD's weightings on mtlfast's solvers: what each reads of its module, with TorchJD's absolute epsilons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlfast import ops

# (the weighting, its Gram matrix in float64, that matrix as it was given) -> the weights, or None: not this time.
Engine = Callable[[Any, Tensor, Tensor], Tensor | None]


def _rtol(given: Tensor) -> float:
    """TorchJD's cutoff for eigenvalues: that of the dtype it computes in."""
    return len(given) * torch.finfo(given.dtype).eps


def _zero_below(gram: Tensor, eps: float) -> Tensor:
    """TorchJD takes a matrix whose trace is below eps for zero."""
    return torch.where(gram.trace() < eps, 0.0, gram)


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
    state = weighting._phi_t.to(gram)
    params = {"beta": float(weighting.beta), "eps": float(weighting.eps)}
    weights = ops.solve(gram, "gradvac", params, {"keys": _keys(orders, True, gram.device)}, state)
    weighting._phi_t = state.to(weighting._phi_t)  # host: where TorchJD keeps it
    return weights


def mgda(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """Frank and Wolfe's steps, as many as there."""
    params = {"epsilon": weighting.epsilon, "max_iters": weighting.max_iters, "norms": 0}
    return ops.solve(gram, "mgda", params)


def cagrad(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """To the optimum, where TorchJD's convex solver stops some digits before."""
    eps = float(weighting.norm_eps)
    params = {"c": float(weighting.c), "rescale": 0, "norm_eps": eps}
    return ops.solve(_zero_below(gram, eps), "cagrad", params)


def _dual_cone(method: str) -> Engine:
    def engine(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
        from torchjd.linalg import QuadprogProjector

        projector = weighting.projector
        if type(projector) is not QuadprogProjector:  # someone's own
            return None
        params = {"reg_eps": float(projector.reg_eps), "of_trace": True}
        inputs = {"preferences": weighting.weighting(given)}
        return ops.solve(_zero_below(gram, projector.norm_eps), method, params, inputs)

    return engine


def aligned_mtl(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
    """An unknown scale mode is left to TorchJD's own error."""
    if weighting.scale_mode not in ("min", "median", "rmse"):
        return None
    params = {"scale_mode": ("min", "median", "rmse").index(weighting.scale_mode), "rtol": _rtol(given)}
    return ops.solve(gram, "aligned_mtl", params, {"preferences": weighting.weighting(given)})


def imtlg(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """The pseudo-inverse with torch's own cutoff."""
    return ops.solve(gram, "imtlg", {"rtol": _rtol(given)})


def krum(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """Too few gradients are TorchJD's own error."""
    weighting._check_matrix_shape(given)
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


def config(aggregator: Any, gram: Tensor, jacobian: Tensor, columns: int) -> Tensor:
    """ConFIG's weights; its pseudo-inverse cuts singular values of a matrix that wide off by torch's own rule."""
    cutoff = max(len(gram), columns) * torch.finfo(jacobian.dtype).eps
    params = {"length": -1, "task": 0, "rtol": cutoff**2}
    return ops.solve(gram, "config", params, {"preferences": aggregator.weighting(jacobian)})
