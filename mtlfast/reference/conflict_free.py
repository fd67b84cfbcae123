"""ConFIG: Liu et al., "Towards Conflict-free Training of Physics Informed Neural Networks" (ICLR 2025), on K x P."""

import torch
from torch import Tensor

from mtlfast.reference.group import BY_NOISE, Group
from mtlfast.reference.norm_balance import typical_norm
from mtlfast.reference.singular import pseudo_inverse_times, unit_rows


def config(group: Group) -> Tensor:
    """Weights [K]; length: -1 projection, else a typical norm; task: whose."""
    length, task, rtol = (group.params[name] for name in ("length", "task", "rtol"))
    units, norms = unit_rows(group.matrix)
    x, rank = pseudo_inverse_times(units, group.preferences(), rtol)
    group.tally(BY_NOISE, rank < int((norms > 0).sum()))
    direction = x @ units
    if not direction.any():
        return torch.zeros_like(norms)
    lengths = norms if length < 0 else torch.full_like(norms, typical_norm(norms, int(length), group.place(int(task))))
    projections = lengths * (units @ direction) / direction.norm()
    return torch.where(norms > 0, projections.sum() / direction.norm() * x / norms, 0.0)
