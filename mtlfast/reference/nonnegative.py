"""Least squares with nonnegative unknowns, and what follows from it: the references' one solver."""

import torch
from torch import Tensor


def nonnegative_least_squares(A: Tensor, b: Tensor) -> Tensor:
    """The x >= 0 of least |A x - b|: Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23.

    Args:
        A: [m, n] float64.
        b: [m] float64.
    """
    norms = A.norm(dim=0)
    scale = torch.where(norms > 0, 1 / norms.clamp(min=torch.finfo(A.dtype).tiny), 0.0)
    A = A * scale
    n = A.shape[1]
    x, passive = A.new_zeros(n), torch.zeros(n, dtype=torch.bool)
    tolerance = 1e-14 * float(b.norm()) * n
    refused: set[int] = set()
    for _ in range(10 * n):
        gain = A.T @ (b - A @ x)
        candidates = [i for i in gain.argsort(descending=True).tolist() if not passive[i] and i not in refused]
        if not candidates or gain[candidates[0]] <= tolerance:
            break
        new = candidates[0]
        passive[new] = True
        first = True
        while True:
            z = A.new_zeros(n)
            z[passive] = torch.linalg.lstsq(A[:, passive], b, driver="gelsd").solution
            if first and z[new] <= 0:  # rounding: what it would gain is less than what is computed
                passive[new] = False
                refused.add(new)
                break
            if bool((z[passive] > 0).all()):
                x, refused = z, set()
                break
            negative = passive & (z <= 0)
            step = float((x[negative] / (x[negative] - z[negative])).min())
            x = x + step * (z - x)
            passive &= x > 1e-15 * float(x.max())
            x[~passive] = 0
            first = False
    unscaled: Tensor = x * scale
    return unscaled


def shortest_in_hull(matrix: Tensor) -> Tensor:
    """The weights on the simplex whose combination of the rows of [K, P] is shortest.

    Wolfe, "Finding the nearest point in a polytope" (1976): with one more coordinate, the same for all rows, it is a
    least-squares problem over the cone of the rows. Rows of zeros share all the weight.
    """
    norms = matrix.norm(dim=1)
    if bool((norms == 0).any()):
        zero: Tensor = (norms == 0).double()
        return zero / zero.sum()
    height = norms.min()
    A = torch.cat([matrix.T, height.expand(1, len(matrix))])
    target = torch.zeros_like(A[:, 0])
    target[-1] = height
    x = nonnegative_least_squares(A, target)
    return x / x.sum()


def project_onto_simplex(v: Tensor) -> Tensor:
    """The nearest point with w >= 0 and sum w = 1, by sorting (Duchi et al., ICML 2008)."""
    v = v - v.max()
    ordered = v.sort(descending=True).values
    sums = ordered.cumsum(0) - 1
    counts = torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)
    last = int((ordered - sums / counts > 0).sum()) - 1
    nearest: Tensor = (v - sums[last] / counts[last]).clamp(min=0)
    return nearest
