"""IMTL-G: Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021), on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import BY_NOISE, Group
from mtlfast.reference.singular import pseudo_inverse_times, unit_rows


def imtlg(group: Group) -> Tensor:
    """Weights [K]: v = G^+ d over its sum. The rank is that of the unit gradients."""
    rtol = group.params["rtol"]
    units, norms = unit_rows(group.matrix)
    x, rank = pseudo_inverse_times(units, torch.ones_like(norms), rtol)
    independent = rank == int((norms > 0).sum())
    if independent:
        v = torch.where(norms > 0, x / norms, 0.0)
    else:
        v, _ = pseudo_inverse_times(group.matrix / group.matrix.norm(), norms, rtol)
    cancels = bool(v.sum().abs() <= rtol * v.abs().sum())
    group.tally(BY_NOISE, not independent or (cancels and bool(v.any())))
    return torch.zeros_like(v) if cancels else v / v.sum()
