"""Aligned-MTL, Algorithm 1 of Senushkin et al., "Independent Component Alignment" (CVPR 2023), on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group
from mtlfast.reference.singular import eigen


def aligned_mtl(group: Group) -> Tensor:
    """Weights [K]; scale_mode: 0 min, 1 median, 2 rmse."""
    mode, rtol = group.params["scale_mode"], group.params["rtol"]
    if not group.matrix.any():
        return group.preferences()
    values, vectors = eigen(group.matrix, rtol)
    scale = (values[-1], values.median(), values.mean())[int(mode)]
    weights: Tensor = torch.sqrt(scale) * vectors @ (vectors.T @ group.preferences() / values.sqrt())
    return weights
