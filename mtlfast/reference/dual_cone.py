"""UPGrad (Quinton and Rey 2024) and DualProj (Lopez-Paz and Ranzato, NeurIPS 2017) on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group
from mtlfast.reference.nonnegative import nonnegative_least_squares


def upgrad(group: Group) -> Tensor:
    """Weights [K]: each task's part of the preferred combination, projected, added up."""
    matrix = _regularised(group)
    parts = [_onto_dual_cone(matrix, part) for part in group.preferences().diag()]
    return torch.stack(parts).sum(dim=0)


def dualproj(group: Group) -> Tensor:
    """Weights [K]: the preferred combination, projected."""
    return _onto_dual_cone(_regularised(group), group.preferences())


def _regularised(group: Group) -> Tensor:
    """Rows whose Gram matrix is G / trace(G) + reg_eps I."""
    norm = group.matrix.norm()
    scaled = group.matrix / norm if norm > 0 else group.matrix
    eye = torch.eye(group.num_tasks, dtype=scaled.dtype, device=scaled.device)
    return torch.cat([scaled, group.params["reg_eps"] ** 0.5 * eye], dim=1)


def _onto_dual_cone(matrix: Tensor, u: Tensor) -> Tensor:
    """v = u + x with the x >= 0 of least |(u + x) J|: v J is the projection of u J."""
    return u + nonnegative_least_squares(matrix.T, -(u @ matrix))
