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
    return ops.solve(gram, "pcgrad", [0.0, 0.0], [_keys(orders, False, gram.device)])


def gradvac(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """Its running cosines stay in TorchJD's buffer, on the CPU and in its dtype."""
    weighting._ensure_state(len(gram), given.dtype)
    orders = [torch.randperm(len(gram) - 1) for _ in range(len(gram))]
    state = weighting._phi_t.to(gram)
    params = [float(weighting.beta), float(weighting.eps)]
    weights = ops.solve(gram, "gradvac", params, [_keys(orders, True, gram.device)], state)
    weighting._phi_t = state.to(weighting._phi_t)  # host: where TorchJD keeps it
    return weights


def mgda(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """Frank and Wolfe's steps, as many as there."""
    return ops.solve(gram, "mgda", [weighting.epsilon, weighting.max_iters, 0.0])


def cagrad(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """To the optimum, where TorchJD's convex solver stops some digits before."""
    eps = float(weighting.norm_eps)
    return ops.solve(_zero_below(gram, eps), "cagrad", [float(weighting.c), 0.0, eps])


def _dual_cone(method: str) -> Engine:
    def engine(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
        from torchjd.linalg import QuadprogProjector

        projector = weighting.projector
        if type(projector) is not QuadprogProjector:  # someone's own
            return None
        preferences = weighting.weighting(given)
        return ops.solve(_zero_below(gram, projector.norm_eps), method, [float(projector.reg_eps)], [preferences])

    return engine


def aligned_mtl(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
    """An unknown scale mode is left to TorchJD's own error."""
    if weighting.scale_mode not in ("min", "median", "rmse"):
        return None
    mode = ("min", "median", "rmse").index(weighting.scale_mode)
    return ops.solve(gram, "aligned_mtl", [mode, _rtol(given)], [weighting.weighting(given)])


def imtlg(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """The pseudo-inverse with torch's own cutoff."""
    return ops.solve(gram, "imtlg", [_rtol(given)])


def krum(weighting: Any, gram: Tensor, given: Tensor) -> Tensor:
    """Too few gradients are TorchJD's own error."""
    weighting._check_matrix_shape(given)
    return ops.solve(gram, "krum", [weighting.n_byzantine, weighting.n_selected])


def fairgrad(weighting: Any, gram: Tensor, given: Tensor) -> Tensor | None:
    """A bound on the iterations, which is another result, is left to TorchJD."""
    if weighting.max_iters is not None or not weighting.alpha >= 0:
        return None
    return ops.solve(gram, "fairgrad", [float(weighting.alpha), _rtol(given)])


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
    return ops.solve(gram, "config", [-1.0, 0.0, cutoff**2], [aggregator.weighting(jacobian)])
