"""scale_: norm balancing in place."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, SHAPES, draw

from mtlfast import TaskGradients, ops, reference


def copy_of(grads: TaskGradients) -> TaskGradients:
    return TaskGradients.from_rows([[None if g is None else g.clone() for g in row] for row in grads.rows])


def assert_scaled(grads: TaskGradients, before: TaskGradients, factors: torch.Tensor) -> None:
    # The kernel multiplies in float (fp64 in double) by the factor rounded to it.
    wide = torch.float64 if grads.dtype == torch.float64 else torch.float32
    for row, old_row, factor in zip(grads.rows, before.rows, factors.to(wide), strict=True):
        for g, old in zip(row, old_row, strict=True):
            assert (g is None) == (old is None)
            if g is not None:
                assert torch.equal(g, (old.to(wide) * factor).to(grads.dtype))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(layout, shapes, dtype, device):
    grads = draw(4, shapes, dtype, layout, missing=0.2, device=device)
    before, factors = copy_of(grads), torch.randn(4, device=grads.device)
    assert ops.scale_(grads, factors) is grads
    assert_scaled(grads, before, factors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(dtype, device):
    grads = draw(3, SHAPES["mixed"], dtype, device=device)
    other, factors = copy_of(grads), torch.tensor([2.0, -0.25, 1.0], device=device)
    ops.scale_(grads, factors)
    reference.scale_(other, factors)
    assert all(torch.equal(a, b) for a, b in zip(grads.flat(), other.flat(), strict=True))


def test_entries_that_share_memory_are_scaled_once(device):
    twice, own = torch.ones(10, device=device), torch.ones(4, device=device)
    grads = TaskGradients.from_rows([[twice, twice, own], [twice, twice[:10], own[:4]]])
    ops.scale_(grads, torch.tensor([2.0, 3.0], device=device))
    assert [[g.unique().item() for g in row] for row in grads.rows] == [[2, 2, 2], [3, 3, 3]]
    assert ops.gram(grads)[0, 1] == 24 * 6


def test_what_is_not_finite_stays(device):
    grads = draw(1, [(5,)], device=device)
    grads.rows[0][0][2] = torch.inf
    ops.scale_(grads, torch.zeros(1, device=device))
    assert grads.rows[0][0].isnan().tolist() == [False, False, True, False, False]


# An original -> the gradient, and who must not see it change. torch._lazy_clone copies at the first write.
LAZY_COPIES = {
    "of the gradient": lambda x: (x, torch._lazy_clone(x)),
    "as the gradient": lambda x: (torch._lazy_clone(x), x),
    "of its storage": lambda x: (torch._lazy_clone(x)[5:], x),
}


@pytest.mark.parametrize("copied", LAZY_COPIES)
def test_a_lazy_copy_is_not_written(copied, device):
    gradient, other = LAZY_COPIES[copied](torch.ones(10, device=device))
    grads = TaskGradients.from_rows([[gradient], [torch.ones_like(gradient)]])
    ops.scale_(grads, torch.tensor([2.0, 3.0], device=device))
    assert grads.rows[0][0] is gradient
    assert gradient.unique().item() == 2
    assert other.unique().item() == 1
    assert ops.gram(grads)[0, 1] == 6 * len(gradient)


def test_a_lazy_copy_of_a_marshalled_gradient_is_not_written(device):
    gradient = torch.ones(10, device=device)
    grads = TaskGradients.from_rows([[gradient], [torch.ones_like(gradient)]])
    other = torch._lazy_clone(gradient)
    ops.scale_(grads, torch.tensor([2.0, 3.0], device=device))
    assert gradient.unique().item() == 2
    assert other.unique().item() == 1
    assert ops.gram(grads)[0, 1] == 60


@pytest.mark.parametrize("scale_", [ops.scale_, reference.scale_])
def test_factors_that_are_a_gradient_are_read_before_it_is_scaled(scale_, device):
    factors = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)
    other = torch.ones_like(factors)
    scale_(TaskGradients.from_rows([[factors], [other]]), factors)
    assert factors.tolist() == [4, 6]
    assert other.tolist() == [3, 3]
