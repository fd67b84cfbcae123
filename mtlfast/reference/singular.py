"""What the singular values of a K x P matrix J give for G = J J^T, without forming G."""

import torch
from torch import Tensor


def eigen(matrix: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """The eigenvalues [r] of J J^T above rtol times the largest, descending, and their eigenvectors [K, r]."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    squares = values.square()
    kept = squares > rtol * squares.max()
    return squares[kept], vectors[:, kept]


def pseudo_inverse_times(matrix: Tensor, v: Tensor, rtol: float) -> tuple[Tensor, int]:
    """(J J^T)^+ v [K], zero where v is outside of the range up to rounding; and the rank by rtol."""
    values, vectors = eigen(matrix, rtol)
    inside = vectors.T @ v
    result: Tensor = vectors @ (inside / values)
    if not len(values) or v @ result * values[0] <= rtol**2 * v @ v:
        return torch.zeros_like(v), len(values)
    return result, len(values)


def unit_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The unit gradients [K, P] (rows of zeros stay) and the norms [K]."""
    norms = matrix.norm(dim=1)
    return torch.where(norms[:, None] > 0, matrix / norms[:, None], 0.0), norms
