"""UPGrad (Quinton and Rey 2024) and DualProj (Lopez-Paz and Ranzato, NeurIPS 2017) on the K x P matrix."""

import torch
from torch import Tensor

from mtlfast.reference.group import Group
from mtlfast.reference.nonnegative import nonnegative_least_squares


def upgrad(group: Group) -> Tensor:
    """Weights [K]: each task's part of the preferred combination, projected, added up."""
    cone = _Cone(group)
    return torch.stack([cone.project(part) for part in group.preferences().diag()]).sum(dim=0)


def dualproj(group: Group) -> Tensor:
    """Weights [K]: the preferred combination, projected."""
    return _Cone(group).project(group.preferences())


class _Cone:
    """The gradients over their lengths, or over one length for all, regularised by more columns."""

    def __init__(self, group: Group) -> None:
        matrix = group.matrix
        lengths = matrix.norm(dim=1)
        self.lengths = lengths.square().sum().sqrt().expand_as(lengths) if group.params["of_trace"] else lengths
        units = matrix / torch.where(self.lengths > 0, self.lengths, 1)[:, None]
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        self.matrix = torch.cat([units, group.params["reg_eps"] ** 0.5 * eye], dim=1)

    def project(self, u: Tensor) -> Tensor:
        """v = u + x with the x >= 0 of least |(u + x) J|: v J is the projection of u J."""
        x = nonnegative_least_squares(self.matrix.T, -(u * self.lengths) @ self.matrix)
        return u + torch.where(self.lengths > 0, x / self.lengths, 0)


def nearest_in_dual_cone(matrix: Tensor, u: Tensor) -> Tensor:
    """Weights [K] of the direction nearest to u J with which no row of J has a negative product."""
    return _Cone(Group(matrix, {"reg_eps": 0.0, "of_trace": False})).project(u)
