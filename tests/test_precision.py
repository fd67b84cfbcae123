"""The precision of gram (docs/promises.md) on long rows: constant, positive, and nearly orthogonal ones."""

import pytest
import torch

from mtlfast import TaskGradients, ops

pytestmark = pytest.mark.native
P = {"cpu": 200_000_000, "cuda": 20_000_000}
BOUNDS = {"exact": 1e-13, "fast": 1e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_constant_rows(dtype, device):
    # The worst case: every float addition rounds the same way. No worse pair of numbers was found than these.
    rows = [[torch.full((P[device],), value, dtype=dtype, device=device)] for value in (1.6766815, 1.1571467)]
    values = torch.stack([row[0][0].double() for row in rows])
    exact = P[device] * values.outer(values)
    grads = TaskGradients.from_rows(rows)
    for precision, rtol in BOUNDS.items():
        assert ((ops.gram(grads, precision=precision) - exact).abs() <= rtol * exact).all()
    assert ((ops.norms(grads) - exact.diagonal().sqrt()).abs() <= 1e-13 * exact.diagonal().sqrt()).all()


def test_positive_rows(device):
    x, y = torch.rand(P[device], device=device), torch.rand(P[device], device=device).add_(0.5)
    exact = torch.zeros(2, 2, dtype=torch.float64, device=device)
    for a, b in zip(x.split(10_000_000), y.split(10_000_000), strict=True):
        J = torch.stack([a, b]).double()
        exact += torch.stack([(J * row).sum(1) for row in J])  # in pairs; a matrix product errs by 4e-13 here
    for precision, rtol in BOUNDS.items():
        G = ops.gram(TaskGradients.from_rows([[x], [y]]), precision=precision)
        assert ((G - exact).abs() <= rtol * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", BOUNDS)
def test_the_sign_of_a_conflict_is_right(precision, dtype, device):
    # 13,284 pairs of rows that are orthogonal but for what rounding left; a wrong sign would project, or not, wrongly.
    wrong, judged = 0, 0
    for _ in range(4):
        Q = torch.linalg.qr(torch.randn(6000, 82, dtype=torch.float64))[0].T
        J = ((Q + 1e-5 * torch.randn(82, 82, dtype=torch.float64) @ Q) * 30).to(dtype)
        exact, size = J.double() @ J.double().T, J.double().abs() @ J.double().abs().T
        G = ops.gram(TaskGradients.from_matrix(J.to(device)), precision=precision).cpu()
        pairs = torch.ones(82, 82, dtype=torch.bool).tril(-1) & (exact.abs() > BOUNDS[precision] * size)
        wrong += int((G.sign() != exact.sign())[pairs].sum())
        judged += int(pairs.sum())
    assert judged > 5000
    assert wrong == 0
