"""Aligned-MTL, Algorithm 1 of Senushkin et al., "Independent Component Alignment" (CVPR 2023), on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import BY_NOISE, Group
from mtlfast.reference.singular import eigen, unit_rows


def aligned_mtl(group: Group) -> Tensor:
    """Weights [K]; scale_mode: 0 min, 1 median, 2 rmse."""
    mode, rtol = group.params["scale_mode"], group.params["rtol"]
    if not group.matrix.any():
        return group.preferences()
    # A gradient that is short against the others has a small singular value as well as one that depends on them.
    units, norms = unit_rows(group.matrix)
    rank = len(eigen(units, rtol)[0])
    group.tally(BY_NOISE, rank < int((norms > 0).sum()))
    values, vectors = (found[..., :rank] for found in eigen(group.matrix, 0.0))
    scale = (values[-1], values.median(), values.mean())[int(mode)]
    weights: Tensor = torch.sqrt(scale) * vectors @ (vectors.T @ group.preferences() / values.sqrt())
    return weights
