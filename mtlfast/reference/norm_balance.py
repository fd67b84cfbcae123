"""Norm balancing on the K x P matrix: weights from the gradients' norms alone; a zero gradient has weight 0."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group


def typical_norm(norms: Tensor, kind: int, task: int) -> float:
    """The mean, geometric mean, harmonic mean, least, largest, lower median norm of those not zero, or a task's."""
    some = norms[norms > 0]
    if kind < 6 and not len(some):
        return 0.0
    chosen = (
        lambda: some.mean(),
        lambda: some.log().mean().exp(),
        lambda: 1 / (1 / some).mean(),
        lambda: some.min(),
        lambda: some.max(),
        lambda: some.median(),
        lambda: norms[task],
    )[kind]()
    return float(chosen)


def norm_balance(group: Group) -> Tensor:
    """Weights [K]; target: which norm all get; task: whose."""
    norms = group.matrix.norm(dim=1)
    return _weights(
        norms, typical_norm(norms, int(group.params["target"]), group.place(int(group.params["task"]))) / norms
    )


def clip_norm(group: Group) -> Tensor:
    """Weights [K]; max_norm: -1 for the mean; loss_scale: what it is multiplied by."""
    norms, most = group.matrix.norm(dim=1), group.params["max_norm"]
    limit = typical_norm(norms, 0, 0) if most < 0 else most * group.loss_scale()
    return _weights(norms, (limit / norms).clamp(max=1))


def cross_norm(group: Group) -> Tensor:
    """Weights [K]: of two tasks, the other's norm over one's own."""
    norms = group.matrix.norm(dim=1)
    return _weights(norms, norms.flip(0) / norms)


def inverse_norm(group: Group) -> Tensor:
    """Weights [K]: the inverses of the norms, over their sum."""
    norms = group.matrix.norm(dim=1)
    inverse = _weights(norms, 1 / norms)
    return inverse / inverse.sum() if inverse.any() else inverse


def _weights(norms: Tensor, weights: Tensor) -> Tensor:
    return torch.where(norms > 0, weights, 0.0)
